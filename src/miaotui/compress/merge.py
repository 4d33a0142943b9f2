"""Several checkpoints of one architecture into one, streamed tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from miaotui.checkpoint.write import atomic_folder
from miaotui.compress.methods import merging
from miaotui.compress.places import Model
from miaotui.compress.writing import dense
from miaotui.errors import CheckpointError, UsageError
from miaotui.model.spec import ModelSpec
from miaotui.model.tokenizer import Tokenizer

Method = Literal["linear", "slerp", "ties", "dare", "task-arithmetic"]

BASED = ("ties", "dare", "task-arithmetic")
"""Methods that add up changes to a base."""
DENSITIES = {"ties": 0.2, "dare": 0.5}
"""Shares of a change that are kept: the paper's for TIES; DARE's papers drop more, which small models bear badly."""
NAMED = 20
"""Mismatches of each model that an error spells out."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    weights: one for each model; None: equal, with the sum 1. For linear and TIES only their proportions matter; for
    SLERP they say where between the two; DARE and task arithmetic multiply each change by its own. density: share of a
    change that TIES and DARE keep; None: DENSITIES. scale: what the merged change is multiplied by (λ in all three
    papers). seed: of DARE's draws.
    """

    method: Method = "linear"
    weights: tuple[float, ...] | None = None
    base: str | None = None
    density: float | None = None
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UsageError(
                f"There is no method {self.method!r:.60}.", f"Choose one of {', '.join(get_args(Method))}."
            )
        if self.method in BASED and self.base is None:
            raise UsageError(f"{self.method} needs a base.", "Name the model that all were trained from: --base MODEL.")
        if self.method not in BASED and self.base is not None:
            raise UsageError(f"{self.method} has no use for a base.", "Leave --base out.")
        if self.density is not None and self.method not in DENSITIES:
            raise UsageError(f"{self.method} has no use for a density.", "Leave --density out.")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"The density is {self.density}.", "Give a share above 0, up to 1.")
        if self.scale != 1 and self.method not in BASED:
            raise UsageError(f"{self.method} has no use for a scale.", "Leave --scale out.")
        if not math.isfinite(self.scale):
            raise UsageError(f"The scale is {self.scale}.", "Give a number, such as 0.5.")

    def weights_for(self, models: int) -> tuple[float, ...]:
        """One weight for each model. Raises UsageError where they do not fit the method or the number of models."""
        weights = self.weights or (1 / models,) * models
        if len(weights) != models:
            raise UsageError(f"There are {len(weights)} weights for {models} models.", "Give one for each, in order.")
        if not all(map(math.isfinite, weights)):
            raise UsageError(f"The weights are {weights}.", "Give numbers, such as 0.7,0.3.")
        if self.method in ("linear", "slerp", "ties") and (min(weights) < 0 or sum(weights) <= 0):
            raise UsageError(
                f"{self.method} has the weights {', '.join(map(str, weights))}.",
                "Give weights of 0 or more, not all 0.",
            )
        if self.method == "slerp" and models != 2:
            raise UsageError(f"SLERP lies between two models, and {models} are given.", "Give two, or use linear.")
        if models == 1 and self.method == "linear":
            raise UsageError("One model alone has nothing to be merged with.", "Give at least two.")
        return weights


@dataclass(frozen=True)
class MergeReport:
    """What was written: how many tensors and parameters, into which folder, by which weights."""

    out: str
    tensors: int
    parameters: int
    bytes: int
    weights: tuple[float, ...]
    density: float | None


def merge(
    models: Sequence[str], settings: MergeSettings, out: Path, *, tell: Tell = lambda done, total: None
) -> MergeReport:
    """Merge into a new folder, with the configuration and tokenizer of the base (or of the first model).

    Memory: for the tensor at hand, one float32 copy of it for each model and two more.
    Raises UsageError for quantised inputs and CheckpointError, naming each, for tensors, settings or tokens that the
    models do not share.
    """
    weights = settings.weights_for(len(models))
    opened = [dense.open_dense(model, "merge") for model in models]
    base = None if settings.base is None else dense.open_dense(settings.base, "merge")
    pattern, names = (opened[0], models[0]) if base is None else (base, settings.base)
    assert names is not None
    others = dict(zip(models, opened, strict=True))
    stored = dense.dense_shapes(pattern)
    _check(names, pattern, stored, others)
    density = settings.density if settings.density is not None else DENSITIES.get(settings.method)
    blend = _Blend(opened, base, weights, settings, density or 1.0, tell, len(stored))
    tensors = [
        dense.Written(name, dense.dense_tensor(pattern, name).type, shape, partial(blend, name))
        for name, shape in stored.items()
    ]
    with atomic_folder(out) as folder:
        dense.write_dense(folder, tensors, dense.plain_config(pattern.checkpoint), pattern.checkpoint)
        _write_notes(folder, models, settings, weights, density)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parameters = sum(math.prod(shape) for shape in stored.values())
    return MergeReport(str(out), len(stored), parameters, size, weights, density)


@dataclass(eq=False)
class _Blend:
    """One merged tensor after the other, by name."""

    models: Sequence[Model]
    base: Model | None
    weights: tuple[float, ...]
    settings: MergeSettings
    density: float
    tell: Tell
    total: int
    done: int = 0

    def __call__(self, name: str) -> dense.Floats:
        tensors = [_values(model, name) for model in self.models]
        merged = self._merge(name, tensors).numpy()
        if not np.isfinite(merged).all():
            raise CheckpointError(
                f"The tensor {name!r:.100} merges to numbers that are not finite.", "Check the models."
            )
        self.done += 1
        self.tell(self.done, self.total)
        return merged

    def _merge(self, name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        method, weights, scale = self.settings.method, self.weights, self.settings.scale
        if method == "linear":
            return merging.linear(tensors, weights)
        if method == "slerp":
            return merging.slerp(tensors[0], tensors[1], weights[1] / sum(weights))
        assert self.base is not None
        base = _values(self.base, name)
        if method == "ties":
            merged = merging.ties(base, tensors, weights, self.density)
            return merged if scale == 1 else torch.lerp(base, merged, scale)
        scaled = [weight * scale for weight in weights]
        if method == "task-arithmetic":
            return merging.task_arithmetic(base, tensors, scaled)
        draws = [merging.generator_for(self.settings.seed, index, name) for index in range(len(tensors))]
        return merging.dare(base, tensors, scaled, self.density, draws)


def _values(model: Model, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(dense.dense_tensor(model, name).dense32()))


# -- whether they can be merged ------------------------------------------------------------------------------
def _check(first: str, pattern: Model, stored: Mapping[str, tuple[int, ...]], others: Mapping[str, Model]) -> None:
    """Raise one CheckpointError that names all that the models do not share."""
    told = []
    for name, other in others.items():
        found = [] if other is pattern else list(_mismatches(pattern, stored, other))
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        told += [f"{name}: {'; '.join(found[:NAMED])}{more}"] if found else []
    if told:
        raise CheckpointError(
            f"These models cannot be merged with {first}. {'. '.join(told)}.",
            "Merge models that were trained from the same one.",
        )


def _mismatches(pattern: Model, stored: Mapping[str, tuple[int, ...]], other: Model) -> Iterator[str]:
    """What of another model is not as the pattern's is: settings, tensors, tokens."""
    ours, theirs = _settings(pattern.spec), _settings(other.spec)
    for key, mine, its in dense.differences(ours, theirs):
        yield f"its {key} is {its}, not {mine}"
    for name, shape in stored.items():
        if name not in other.present:
            yield f"it lacks {name}"
        elif (its_shape := other.checkpoint.tensor(name).shape) != shape:
            yield f"its {name} is {_by(its_shape)}, not {_by(shape)}"
    ignored = pattern.names.ignorable + ((pattern.names.head + ".weight",) if pattern.spec.tied_head else ())
    for name in sorted(other.present - stored.keys()):
        if not any(part in name for part in ignored):
            yield f"it has {name} besides"
    tokens = list(dense.differences(_vocabulary(pattern), _vocabulary(other)))
    if tokens:
        token, mine, its = tokens[0]
        yield f"{len(tokens)} of its tokens differ, such as {token!r:.40} ({its}, not {mine})"


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _settings(spec: ModelSpec) -> dict[str, Any]:
    """What changes a model's mathematics, as values that can be compared; how long its context is does not count."""
    plain = {f.name: getattr(spec, f.name) for f in fields(spec)}
    for key in ("layers", "max_position", "bos_token_id", "eos_token_ids"):
        del plain[key]
    plain["num_hidden_layers"] = len(spec.layers)
    for index, layer in enumerate(spec.layers):
        a = layer.attention
        rope = None if a.rope is None else {k: _comparable(v) for k, v in vars(a.rope).items()}
        plain[f"attention of layer {index}"] = (a.heads, a.kv_heads, a.head_dim, a.scale, a.window, a.softcap, rope)
        plain[f"experts of layer {index}"] = layer.experts
    return plain


def _comparable(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _vocabulary(model: Model) -> dict[str, int]:
    """Every token's id; empty without a tokenizer."""
    if model.checkpoint.asset("tokenizer.json") is None:
        return {}
    vocabulary: dict[str, int] = Tokenizer.from_checkpoint(model.checkpoint).backend.get_vocab(with_added_tokens=True)
    return vocabulary


# -- what lies beside the weights ------------------------------------------------------------------------------
def _write_notes(
    folder: Path, models: Sequence[str], settings: MergeSettings, weights: tuple[float, ...], density: float | None
) -> None:
    """merge.yaml, to make it again; README.md, to know what it is."""
    import yaml

    plain = {key: value for key, value in asdict(settings).items() if value is not None}
    plain |= {"models": list(models), "weights": list(weights)}
    plain |= {} if density is None else {"density": density}
    if settings.method != "dare":
        del plain["seed"]
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
    (folder / "merge.yaml").write_text(text, encoding="utf-8")
    listed = "\n".join(f"- {model}: {weight:g}" for model, weight in zip(models, weights, strict=True))
    base = "" if settings.base is None else f" onto {settings.base}"
    card = f"# Merged model\n\nMerged by Miaotui with {settings.method}{base}, weights:\n\n{listed}\n\n"
    card += "`merge.yaml` has all settings. Their licences apply together.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
