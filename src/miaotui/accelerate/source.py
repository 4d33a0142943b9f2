"""What the original is, as far as a search must know: shapes, bytes, and whether it once was quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import Checkpoint
from miaotui.compress.places import LINEARS, Model
from miaotui.compress.recipe import parse_scheme
from miaotui.measure.work import parameters, parameters_read
from miaotui.model.families import read_spec
from miaotui.model.spec import ModelSpec
from miaotui.quant.rounding import round_to_nearest
from miaotui.quant.tensor import BlockTensor, DenseTensor, GroupedTensor, Tensor

Floats = NDArray[np.float32]

_GROUPS = (32, 64, 128)
_ROWS = 64
"""Rows of a matrix that are looked at."""
_SHARE = 0.98
"""Of the groups that must lie on a grid: a padded or a pruned one may look otherwise."""


@dataclass(frozen=True)
class Source:
    """`weight_bytes`: on disk; `step_bytes`: about what a step with one token reads of them.

    `stored`: how the linears are kept. `grid`: the size of the groups within which they have at most 16 values, so that
    int4 in such groups loses next to nothing; None for weights that were never so coarse. `rounding`: for each scheme
    that was asked for, what plain rounding does to some of the weights, ‖ΔW‖² ÷ ‖W‖²; `w4g32-asym free` is with minima
    of their own, as GGUF has them.
    """

    spec: ModelSpec
    format: str
    weight_bytes: int
    widths: tuple[int, ...]
    stored: str
    grid: int | None = None
    rounding: Mapping[str, float] = field(default_factory=dict)

    @property
    def step_bytes(self) -> int:
        return self.weight_bytes * parameters_read(self.spec) // parameters(self.spec)

    @property
    def caveat(self) -> str | None:
        """What a reader must know of a model that once was quantised."""
        if self.grid is None:
            return None
        once = "are int4" if self.stored[:2] in ("Q4", "w4") else "were int4 once"
        return (
            f"The original's weights have at most 16 values in each group of {self.grid}: they {once}. Int4 in groups"
            f" of {self.grid} is next to lossless for that reason: with weights that never were quantised it is not."
        )


def examine(checkpoint: Checkpoint, schemes: Sequence[str] = ()) -> Source:
    """Look at headers, and at a few rows of a few matrices. Raises as `model.families.read_spec` does."""
    spec, names = read_spec(checkpoint)
    model = Model(checkpoint, spec, names)
    widths: set[int] = set()
    kinds: set[str] = set()
    grids: list[int | None] = []
    seen: list[Floats] = []
    for tensor in _some_linears(model):
        widths.add(tensor.shape[-1])
        kinds.add(_kind(tensor))
        seen.append(tensor.rows(slice(0, _ROWS)).dense32())
        grids.append(grid_of(seen[-1]))
    known = [grid for grid in grids if grid is not None]
    grid = min(known) if known and len(known) == len(grids) else None
    rounding = {scheme: rounding_error(seen, scheme) for scheme in schemes}
    return Source(
        spec, checkpoint.format, checkpoint.nbytes, tuple(sorted(widths)), "/".join(sorted(kinds)), grid, rounding
    )


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """`license` and `base_model` of the model, where its README or its GGUF metadata have them."""
    names = ("license", "base_model")
    if checkpoint.format == "gguf":
        return {name: checkpoint.config[f"general.{name}"] for name in names if f"general.{name}" in checkpoint.config}
    readme = checkpoint.asset("README.md")
    text = "" if readme is None else readme.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---\n", 2)
    if parts[0] or len(parts) < 3:
        return {}
    import yaml

    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return {name: found[name] for name in names if name in found} if isinstance(found, dict) else {}


def _some_linears(model: Model) -> Iterator[Tensor]:
    """The linears of the first, the middle and the last layer."""
    last = len(model.spec.layers) - 1
    for place in model.places():
        if place.role in LINEARS and not place.bias and place.layer in (0, last // 2, last) and not place.expert:
            yield model.stored(place)


def rounding_error(weights: Sequence[Floats], scheme: str) -> float:
    """‖ΔW‖² ÷ ‖W‖² of rounding these rows to a scheme; with ` free` behind its name, with minima of their own."""
    name, _, free = scheme.partition(" ")
    target = parse_scheme(name).weights
    assert target is not None
    lost = kept = 0.0
    for rows in weights:
        coded = round_to_nearest(rows, target, "free" if free else "zero_point").dense32()
        lost += float(((coded - rows) ** 2).sum())
        kept += float((rows**2).sum())
    return lost / kept


def grid_of(values: Floats) -> int | None:
    """The largest group in which (nearly) every run of a row's weights has at most 16 values; `values` `[rows, in]`."""
    found = None
    for group in _GROUPS:
        if values.shape[1] % group:
            break
        runs = np.sort(values.reshape(-1, group), axis=1)
        distinct = 1 + (np.diff(runs, axis=1) != 0).sum(axis=1)
        if (distinct <= 16).mean() < _SHARE or values.shape[1] < 2 * group:
            break
        found = group
    return found


def _kind(tensor: Tensor) -> str:
    match tensor:
        case BlockTensor():
            return tensor.kind
        case GroupedTensor():
            return str(tensor.scheme)
        case DenseTensor():
            return tensor.type
    raise AssertionError(f"no name for a {type(tensor).__name__}")
