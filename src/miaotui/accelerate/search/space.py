"""What can be tried on this model and this machine, and what cannot help or does not run here, with the reason.

A candidate is two things. What is written: how many layers are left, and the recipe of their weights. And how that is
served: number types of activations and cache, threads, speculation, bounds of a batch; those are recommended in the
artefact (`checkpoint.serving`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from miaotui.accelerate.goals import Goal
from miaotui.accelerate.source import Source
from miaotui.compress.recipe import Budget, Calibration, Recipe, parse_scheme
from miaotui.hardware.detect import Machine

METHODS = ("rtn", "hqq", "awq", "gptq", "awq+gptq")
"""From the quickest to the one that loses least, as a rule."""
SCHEMES = (
    "w4g128-sym", "w4g64-sym", "w4g32-sym", "w4g128-asym", "w4g64-asym", "w4g32-asym", "w8-sym",
)  # fmt: skip
BUDGETS = (4.75, 5.5, 6.5)
MIXED = ("w4g64-sym", "w8g64-sym")
TABLES = ("w8-sym", "keep")
"""What becomes of the table of tokens and of the head."""
GGUF_SCHEMES = ("w4g32-sym", "w4g32-asym", "w8g32-sym")
"""Q4_0, Q4_1, Q8_0. The minimum of Q4_1 is a number of its own, where compressed-tensors has a whole zero point."""
GGUF_METHODS = ("rtn", "gptq")
LOOKED_AT = (*SCHEMES, "w8g32-sym", "w4g32-asym free")
"""What `Source.rounding` is wanted of."""
CUTS = (0.03, 0.07, 0.13)
"""Shares of the layers that may go."""
LEAST_LAYERS, LEAST_BUDGET_TO_CUT = 12, 480.0
"""Models with fewer layers are not cut; nor any in less time, which calibrating and cutting would take up."""

DENSE = ("float16", "bfloat16", "float32")
RECODED = "steps of many rows on weights recoded to int8"
"""What `--compute int8-batch` does, for people."""
NOT_HERE = (
    ("weights in 2 or 3 bits", "this machine's kernels hold them in 4 bits: no byte is saved, and more is lost"),
    ("fp8 weights", "this machine has no kernels that multiply fp8"),
)


@dataclass(frozen=True)
class Serving:
    """How a model is served; the words and defaults are LLM's."""

    compute: str = "auto"
    kv_cache_dtype: str = "auto"
    threads: int | None = None
    speculative: str | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    greedy_screen: bool = True

    def options(self) -> dict[str, Any]:
        """LLM's keyword arguments, where they are not its defaults."""
        return {name: value for name, value in asdict(self).items() if value != getattr(DEFAULT, name)}


DEFAULT = Serving()
PROMISING = (
    "compute", "kv_cache_dtype", "greedy_screen", "speculative", "max_num_batched_tokens", "max_num_seqs", "threads",
)  # fmt: skip
"""Choices of how to serve, those first that change the most work."""


@dataclass(frozen=True)
class Candidate:
    """Weights by `recipe` (None: the original's), of which `blocks` layers are left (None: all), served so."""

    recipe: Recipe | None
    serving: Serving = DEFAULT
    blocks: int | None = None

    @cached_property
    def key(self) -> str:
        """Names it in the journal: the same for the same candidate, always."""
        return _digest({"recipe": self.weights_key, "serving": asdict(self.serving)})

    @cached_property
    def weights_key(self) -> str:
        """The same for the same weights."""
        if self.recipe is None:
            return "original"
        cut = {} if self.blocks is None else {"blocks": self.blocks}
        return _digest({**self.recipe.plain(), **cut})

    @property
    def answers_key(self) -> str:
        """The same for candidates that give the same answers: threads, batches and speculation change none."""
        return f"{self.weights_key} {self.serving.compute} {self.serving.kv_cache_dtype}"

    @property
    def name(self) -> str:
        """For people."""
        parts = [weights_name(self.recipe), *([] if self.blocks is None else [f"{self.blocks} layers left"])]
        words = {
            "compute": "{} compute", "kv_cache_dtype": "{} cache", "threads": "{} threads",
            "speculative": "{} speculation", "max_num_seqs": "{} sequences",
            "max_num_batched_tokens": "{} tokens a step", "greedy_screen": "no screen",
        }  # fmt: skip
        return ", ".join([*parts, *(words[name].format(value) for name, value in self.serving.options().items())])

    def features(self) -> dict[str, str]:
        """Every choice that was made, by dimension."""
        recipe = self.recipe
        weights = {"scheme": "original", "method": "none", "table": "keep", "format": "original", "blocks": "all"}
        if recipe is not None:
            scheme = recipe.scheme if recipe.budget is None else f"{recipe.budget.bits:g} bits"
            weights |= {"scheme": scheme, "method": recipe.method, "table": recipe.embedding, "format": recipe.format}
        if self.blocks is not None:
            weights["blocks"] = str(self.blocks)
        return {**weights, **{name: str(value) for name, value in asdict(self.serving).items()}}

    def served(self, **changes: Any) -> Candidate:
        """The same weights, served otherwise."""
        return replace(self, serving=replace(self.serving, **changes))


ORIGINAL = Candidate(None)


def weights_name(recipe: Recipe | None) -> str:
    """For people: `w4g64-sym by gptq, tokens w8-sym`."""
    if recipe is None:
        return "the original's weights"
    scheme = (
        recipe.scheme if recipe.budget is None else f"{recipe.budget.bits:g} bits of {'/'.join(recipe.budget.choices)}"
    )
    table = {recipe.embedding, recipe.head} - {"keep"}
    parts = [f"{scheme} by {recipe.method}", *(f"tokens {name}" for name in sorted(table))]
    return ", ".join([*parts, *(["as GGUF"] if recipe.format == "gguf" else [])])


def average_bits(recipe: Recipe, width: int) -> float:
    """Bits of a weight of the layers, scales included."""
    return recipe.budget.bits if recipe.budget is not None else parse_scheme(recipe.scheme).bits(width)


@dataclass(frozen=True)
class Space:
    """`weights`: every recipe, served by default, or for memory's sake without a screen. `servings`: every other way to
    serve. `dropped`: (what, why)."""

    weights: tuple[Candidate, ...]
    servings: tuple[Serving, ...]
    dropped: tuple[tuple[str, str], ...] = field(default=())
    rounding: Mapping[str, float] = field(default_factory=dict)
    """As `Source.rounding`."""

    def error(self, candidate: Candidate) -> float | None:
        """What plain rounding to its scheme does to the weights; None where that was not looked at."""
        recipe = candidate.recipe
        if recipe is None or recipe.budget is not None or candidate.blocks is not None:
            return None
        free = " free" if recipe.format == "gguf" and recipe.scheme.endswith("-asym") else ""
        return self.rounding.get(recipe.scheme + free)


def make_space(source: Source, goal: Goal, machine: Machine, calibration: Calibration, budget: float) -> Space:
    """Everything that this source can become and this machine runs, in a budget of so many seconds."""
    dropped = list(NOT_HERE)
    recipes = [*_gguf(source, calibration)]
    if source.format != "gguf":
        recipes = [*_folders(source, calibration, dropped), *recipes]
    screen = goal != "memory"
    served = [Serving(compute=compute, greedy_screen=screen) for compute in ("auto", "fp32")]
    plain = [Candidate(recipe, serving) for recipe in recipes for serving in served]
    cut = [Candidate(recipe, served[0], blocks) for blocks in _cuts(source, budget, dropped) for recipe in recipes]
    servings = tuple(_servings(goal, machine, dropped))
    return Space((*plain, *cut), servings, tuple(dropped), source.rounding)


def _folders(source: Source, calibration: Calibration, dropped: list[tuple[str, str]]) -> Iterator[Recipe]:
    """Recipes for compressed-tensors."""
    tied = source.spec.tied_head
    schemes = list(_fitting(source, dropped))
    bases = [
        Recipe(scheme=scheme, method=method, embedding=table, head="keep" if tied else table, calibration=calibration)
        for scheme, method, table in product(schemes, METHODS, TABLES)
    ]
    yield from bases
    if not {"w4g64-sym", "w8-sym"} <= set(schemes):
        return
    for base in bases:
        if base.scheme == MIXED[0] and base.method in ("rtn", "gptq"):
            yield from (replace(base, budget=Budget(bits, MIXED)) for bits in BUDGETS)


def _gguf(source: Source, calibration: Calibration) -> Iterator[Recipe]:
    """Recipes for GGUF; of a folder, with the tables in 8 bits, as its readers have them."""
    tables = ("keep", "w8g32-sym")
    for scheme, method, table in product(GGUF_SCHEMES, GGUF_METHODS, tables):
        head = "keep" if source.spec.tied_head else table
        yield Recipe(scheme=scheme, method=method, embedding=table, head=head, calibration=calibration, format="gguf")


def _cuts(source: Source, budget: float, dropped: list[tuple[str, str]]) -> Iterator[int]:
    """How many layers may be left."""
    layers = len(source.spec.layers)
    if source.stored not in DENSE:
        dropped.append(("fewer layers", f"its weights are {source.stored}, and only plain numbers can be cut"))
    elif source.format == "gguf":
        dropped.append(("fewer layers", "only models in folders can be cut"))
    elif layers < LEAST_LAYERS:
        dropped.append(("fewer layers", f"it has {layers}, of which none can be spared"))
    elif budget < LEAST_BUDGET_TO_CUT:
        least = f"{LEAST_BUDGET_TO_CUT / 60:g}m"
        dropped.append(("fewer layers", f"finding those to spare takes more than this budget: give --budget {least}"))
    else:
        yield from sorted({layers - max(1, round(share * layers)) for share in CUTS}, reverse=True)
    dropped.append(("training after a cut", "it takes hours on a CPU: cut and distil by hand with miaotui distill"))


def _fitting(source: Source, dropped: list[tuple[str, str]]) -> Iterator[str]:
    """Schemes whose groups divide every row, so that other programs load them too."""
    for scheme in SCHEMES:
        weights = parse_scheme(scheme).weights
        assert weights is not None
        ragged = next((w for w in source.widths if weights.group_size and w % weights.group_size), None)
        if ragged is None:
            yield scheme
        else:
            dropped.append((scheme, f"its groups do not divide rows of {ragged}, which other programs refuse"))


def _servings(goal: Goal, machine: Machine, dropped: list[tuple[str, str]]) -> Iterator[Serving]:
    """Every way but the default: those that differ least from it first, and of those the likeliest to help."""
    cores = machine.usable_cores
    threads: Sequence[int | None] = [None, *sorted({max(1, cores // 2), machine.threads} - {cores})]
    guesses = (None, "ngram") if goal in ("latency", "balanced") else (None,)
    sequences = {"latency": (64,), "memory": (64, 8), "throughput": (64, 128, 32), "balanced": (64,)}[goal]
    tokens = {
        "latency": (512, 256, 1024),
        "memory": (512, 128),
        "throughput": (512, 1024, 2048),
        "balanced": (512, 1024),
    }[goal]
    computes = ["auto"]
    if goal != "memory" and machine.isa_level == "avx2":
        dropped.append((RECODED, "AVX2 alone multiplies codes of 4 bits twice as fast as codes of 8"))
    elif goal != "memory":
        computes.append("int8-batch")
    choices = product(computes, ("auto", "int8"), threads, guesses, sequences, tokens, (goal != "memory",))
    every = (Serving(*chosen) for chosen in choices)
    yield from sorted((s for s in every if s != DEFAULT), key=_unlikely)


def _unlikely(serving: Serving) -> tuple[int, list[int]]:
    options = serving.options()
    return len(options), sorted(PROMISING.index(name) for name in options)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
