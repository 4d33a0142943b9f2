"""What is to become of a model, as frozen settings: read from YAML, written to YAML, every key checked.

    scheme: w4g64-sym            # see `parse_scheme`
    method: awq+gptq             # steps, in this order
    options: {gptq: {damping: 0.02}}
    overrides:
      - {match: "*.mlp.down_proj", scheme: w8g64-sym}
    calibration: {windows: 64, window: 512, seed: 0}

`docs/compress.md` lists the keys. Nothing here needs PyTorch.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from miaotui.compress.types import KEPT, InputScheme, KvScheme, LinearScheme
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme, ScaleType

T = TypeVar("T")

ScaleChoice = Literal["auto", "float16", "bfloat16", "float32"]
Format = Literal["compressed-tensors", "gguf"]
Precision = Literal["auto", "fp32", "bf16"]

TRANSFORMS = ("rotate", "smooth", "awq")
ROUNDERS = ("rtn", "gptq", "hqq", "fp8")
TUNERS = ("qat", "scales")
STEPS = (*TRANSFORMS, *ROUNDERS, *TUNERS)
"""Steps of a method in the only order that they can have. Without a rounder, `rtn` rounds."""

GGUF_SCHEMES = {"q4_0": "w4g32-sym", "q4_1": "w4g32-asym", "q8_0": "w8g32-sym"}
MAX_WINDOW, MAX_WINDOWS = 1 << 17, 1 << 20

_SCHEME = re.compile(r"w([2348])(a8)?(?:-?g(\d{1,5})|-channel)?(?:-(sym|asym))?(-static)?")


@dataclass(frozen=True)
class Override:
    """Linears whose name matches (`*.mlp.down_proj`, `model.layers.0.*`; the first that matches counts)."""

    match: str
    scheme: str

    def __post_init__(self) -> None:
        parse_scheme(self.scheme)


@dataclass(frozen=True)
class Calibration:
    """The text that is run through the model: `windows` runs of `window` tokens, drawn by `seed`.

    source: a file (text, JSON lines, Parquet), `self` for what the model writes itself, or None for the prose that
    Python carries. augment: names of `data.AUGMENTATIONS`. precision of the matrix products: `auto` is bf16 where the
    processor multiplies it natively.
    """

    source: str | None = None
    windows: int = 64
    window: int = 512
    seed: int = 0
    augment: tuple[str, ...] = ()
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        _within("calibration.windows", self.windows, 1, MAX_WINDOWS)
        _within("calibration.window", self.window, 2, MAX_WINDOW)


@dataclass(frozen=True)
class Budget:
    """Mixed precision: the schemes to choose from for each linear, so that a weight takes `bits` bits on average."""

    bits: float
    choices: tuple[str, ...] = ("w3g64-sym", "w4g64-sym", "w8g64-sym")

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise UsageError("A budget with less than two choices decides nothing.", "Give budget.choices two schemes.")
        for scheme in self.choices:
            if parse_scheme(scheme).inputs != "none":
                raise UsageError(
                    f"The budget's choice {scheme!r} codes activations too.", "Choose between schemes of weights."
                )
        if not math.isfinite(self.bits) or not 2 <= self.bits <= 16:
            raise UsageError(f"The budget is {self.bits} bits a weight.", "Give a number from 2 to 16, such as 4.5.")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is written, but the model and the text.

    embedding, head: a scheme, or `keep`; a tied head goes with the embedding. propagate: calibrate each layer on what
    the quantised layers before it give, rather than on the original's activations (which every recipe can share).
    scale_type: `auto` is the checkpoint's own 16-bit type.
    """

    scheme: str = "w4g64-sym"
    method: str = "gptq"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    budget: Budget | None = None
    embedding: str = "keep"
    head: str = "keep"
    kv_cache: KvScheme = "none"
    scale_type: ScaleChoice = "auto"
    propagate: bool = False
    format: Format = "compressed-tensors"
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        base = parse_scheme(self.scheme)
        parse_scheme(self.embedding)
        parse_scheme(self.head)
        steps = self.steps
        _check_order(self.method, steps)
        for step in self.options:
            if step not in steps:
                where = f"the method {self.method!r}"
                raise UsageError(f"Options are given for {step!r:.60}, which {where} lacks.", _closest(step, steps))
        if base.fp8 != ("fp8" in steps):
            raise UsageError(
                f"The scheme {self.scheme!r} and the method {self.method!r} do not go together.",
                "fp8 weights are rounded by the method fp8, and no others are.",
            )

    # -- what it means -----------------------------------------------------------------------------------
    @property
    def steps(self) -> tuple[str, ...]:
        """The method's steps, with its rounder."""
        named = tuple(self.method.split("+"))
        for step in named:
            if step not in STEPS:
                raise UsageError(f"There is no method {step!r:.60}.", _closest(step, STEPS))
        if any(step in ROUNDERS for step in named):
            return named
        at = sum(step in TRANSFORMS for step in named)
        return (*named[:at], "fp8" if parse_scheme(self.scheme).fp8 else "rtn", *named[at:])

    @property
    def rounder(self) -> str:
        return next(step for step in self.steps if step in ROUNDERS)

    @property
    def calibrates(self) -> bool:
        """Whether any step looks at activations."""
        blind = {"rtn", "hqq", "fp8", "rotate"}
        return (
            self.has_static_inputs
            or self.budget is not None
            or self.kv_cache != "none"
            or any(step not in blind for step in self.steps)
            or self.options.get("rtn", {}).get("fit") == "output"
        )

    @property
    def has_static_inputs(self) -> bool:
        """Whether any linear's inputs have one scale for all tokens."""
        schemes = (self.scheme, *(override.scheme for override in self.overrides))
        return any(parse_scheme(scheme).inputs.endswith("-static") for scheme in schemes)

    @property
    def needs_statistics(self) -> bool:
        """Whether statistics of the original's activations are needed; a recipe that propagates gathers its own."""
        return self.budget is not None or (self.calibrates and not self.propagate and not self._only_trains)

    @property
    def _only_trains(self) -> bool:
        """Whether nothing but training looks at activations."""
        rest = replace(self, method="+".join(step for step in self.steps if step not in TUNERS), options={
            step: values for step, values in self.options.items() if step not in TUNERS
        })  # fmt: skip
        return not rest.calibrates

    def overriding(self, name: str) -> set[str]:
        """The override that counts for a linear, if any."""
        return {o.match for o in self.overrides if fnmatchcase(name, o.match)}

    def scheme_of(self, name: str, scale_type: ScaleType) -> LinearScheme:
        """How the linear of that name (without `.weight`) is stored."""
        text = next((o.scheme for o in self.overrides if fnmatchcase(name, o.match)), self.scheme)
        return parse_scheme(text, scale_type)

    # -- YAML --------------------------------------------------------------------------------------------
    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Recipe:
        """From plain values. Raises UsageError for an unknown key, with the nearest known one, or a wrong value."""
        return from_plain(cls, values, "")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a YAML file, or an artefact's folder with its recipe.yaml. Raises UsageError where it cannot be one."""
        import yaml

        path = path / "recipe.yaml" if path.is_dir() else path
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            cause = " ".join(str(error).split())[:200]
            raise UsageError(f"{path} cannot be read: {cause}.", "Give a recipe as YAML.") from error
        if not isinstance(values, Mapping):
            raise UsageError(f"{path} is no recipe: it holds no keys.", "Write `scheme: w4g64-sym` for a start.")
        return cls.parse({key: value for key, value in values.items() if key != "made_with"})

    def plain(self) -> dict[str, Any]:
        """Values that YAML and JSON can hold; `parse` gives the same recipe again."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def yaml(self, made_with: Mapping[str, Any] | None = None) -> str:
        """The recipe's text. `made_with` is for people and is not read again: versions, fingerprints."""
        import yaml

        values = self.plain() | ({} if made_with is None else {"made_with": _plain(made_with)})
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        return text

    def with_(self, **changes: Any) -> Recipe:
        return replace(self, **changes)


# -- schemes -------------------------------------------------------------------------------------------------
def parse_scheme(text: str, scale_type: ScaleType = "float16") -> LinearScheme:
    """`keep`; `fp8`, `fp8-static`; or `w4g64-sym`: bits 2, 3, 4 or 8, groups (`-channel` or nothing: whole rows),
    `-sym` (or nothing) or `-asym`; with `a8` after the bits inputs are int8 too, with `-static` at the end by one scale
    for all tokens: `w8a8`, `w4a8g64-sym`, `w8a8-static`. GGUF's `q4_0`, `q4_1`, `q8_0` are names for groups of 32.

    Raises UsageError for anything else.
    """
    if not isinstance(text, str):
        raise UsageError(f"{text!r:.60} is no scheme.", _SCHEME_HINT)
    lower = text.lower()
    if lower == "keep":
        return KEPT
    if lower in ("fp8", "fp8-static"):
        return LinearScheme(fp8=True, inputs="fp8-static" if lower == "fp8-static" else "fp8-dynamic")
    match = _SCHEME.fullmatch(GGUF_SCHEMES.get(lower, lower))
    size = None if match is None or match[3] is None else int(match[3])
    if match is None or size == 0 or (match[5] and not match[2]):
        raise UsageError(f"{text!r:.60} is no scheme.", _SCHEME_HINT)
    inputs: InputScheme = "none"
    if match[2]:
        inputs = "int8-static" if match[5] else "int8-dynamic"
        if match[4] == "asym":
            raise UsageError(
                f"{text!r:.60} has asymmetric weights beside int8 activations.",
                "Nobody multiplies those; make it symmetric.",
            )
    scale = "float16" if lower in GGUF_SCHEMES else scale_type
    return LinearScheme(QuantScheme(int(match[1]), size, match[4] != "asym", scale), inputs=inputs)


_SCHEME_HINT = "Write bits, groups and symmetry, such as w4g64-sym, w8-sym, w8a8, w4a8g64, or fp8, or keep."


def scheme_name(scheme: LinearScheme) -> str:
    """The text that `parse_scheme` takes."""
    if scheme.kept:
        return "keep"
    if scheme.weights is None:
        return "fp8-static" if scheme.inputs == "fp8-static" else "fp8"
    w = scheme.weights
    inputs = "" if scheme.inputs == "none" else "a8"
    group = "" if w.group_size is None else f"g{w.group_size}"
    static = "-static" if scheme.inputs == "int8-static" else ""
    return f"w{w.bits}{inputs}{group}-{'sym' if w.symmetric else 'asym'}{static}"


# -- plain values into frozen settings -----------------------------------------------------------------------
def from_plain(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass of settings from plain values; `where` is what its keys are called in errors (`options.gptq.`).

    Raises UsageError for a key that it does not have, naming the closest, and for a value of another type.
    """
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise UsageError(f"{where.rstrip('.') or 'The recipe'} is {values!r:.60}.", f"Give keys: {', '.join(known)}.")
    for key in values:
        if key not in known:
            raise UsageError(f"There is no key {where + str(key)!r:.100}.", _closest(str(key), known))
    for f in fields(kind):  # type: ignore[arg-type]
        if f.init and f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{where}{f.name} is missing.", f"The keys are {', '.join(known)}.")
    given = {key: _value(hints[key], value, where + str(key)) for key, value in values.items()}
    return kind(**given)


def _value(hint: Any, value: Any, where: str) -> Any:
    """One value, of the type that is hinted."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _value(next(kind for kind in inner if kind is not type(None)), value, where)
    if origin is Literal:
        if value not in inner:
            raise UsageError(f"{where} is {value!r:.60}.", f"Choose one of {', '.join(map(str, inner))}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where} is {value!r:.60}.", "Give a list.")
        return tuple(_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if is_dataclass(hint):
        return value if isinstance(value, hint) else from_plain(hint, value, where + ".")  # type: ignore[arg-type]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(inner, value, where)
    return value if hint is Any else _scalar(hint, value, where)


def _mapping(inner: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{where} is {value!r:.60}.", "Give names with values.")
    return {key: _value(inner[1], item, f"{where}.{key}") for key, item in value.items()}


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
        raise UsageError(f"{where} is {value!r:.60}.", f"Give {wanted}.")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _closest(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(names)}."


def _check_order(method: str, steps: tuple[str, ...]) -> None:
    """Transformations, then one rounder, then training; nothing twice."""
    places = [STEPS.index(step) for step in steps]
    rounders = [step for step in steps if step in ROUNDERS]
    if len(rounders) > 1:
        raise UsageError(f"The method {method!r:.60} rounds twice.", f"Keep one of {' and '.join(rounders)}.")
    if places != sorted(set(places)):
        right = "+".join(sorted(set(steps), key=STEPS.index))
        raise UsageError(f"The steps of {method!r:.60} cannot follow each other like that.", f"Write {right}.")


def _within(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name} is {value}.", f"Give a whole number from {least} to {most}.")
