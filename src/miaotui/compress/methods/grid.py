"""Grids: the scale and zero point of every group of a weight, fitted, and the codes that they give.

Weights are `[out, in]` float32. Everything is computed with scales already rounded to the scheme's scale type, so that
what a method minimises is what the artefact holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme, ScaleType
from miaotui.quant.tensor import GroupedTensor

Fit = Literal["minmax", "mse", "output"]
"""How ranges are chosen: the group's own; least squared error of the weight; least squared error of the output."""

Minimum = Literal["zero_point", "free"]
"""An asymmetric minimum: a whole number of scales (compressed-tensors), or any number (GGUF's Q4_1)."""

RATIOS = tuple(1.04 - 0.04 * i for i in range(19))
"""Shares of the full range that a search tries, widest first: 1.04 to 0.32."""

_TORCH: dict[ScaleType, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_ROWS_AT_ONCE = 1 << 16
"""Elements that a search keeps in the cache."""


@dataclass(frozen=True, eq=False)
class Grid:
    """value = scale · (code − zero) for every group; scale and zero `[out, groups]` float32.

    zero is a whole number, but for a `free` minimum, where it is None and value = scale · code + minimum.
    """

    scheme: QuantScheme
    width: int
    scale: torch.Tensor
    zero: torch.Tensor | None
    minimum: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return self.scheme.group_size or self.width

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.scheme.bits) - 1

    def rows(self, chosen: slice) -> Grid:
        zero = None if self.zero is None else self.zero[chosen]
        minimum = None if self.minimum is None else self.minimum[chosen]
        return replace(self, scale=self.scale[chosen], zero=zero, minimum=minimum)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as float32 `[out, in]`; ties go to the even one."""
        groups = by_group(weight, self.size)
        if self.zero is not None:
            codes = torch.round(groups / self.scale[..., None]).add_(self.zero[..., None])
        else:
            assert self.minimum is not None
            codes = torch.round((groups - self.minimum[..., None]) / self.scale[..., None])
        return codes.clamp_(0, self.top).flatten(1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes mean, float32 `[out, in]`."""
        groups = by_group(codes, self.size)
        if self.zero is not None:
            return ((groups - self.zero[..., None]) * self.scale[..., None]).flatten(1)
        assert self.minimum is not None
        return (groups * self.scale[..., None] + self.minimum[..., None]).flatten(1)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the grid can hold it."""
        return self.values(self.codes(weight))


@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight in codes, what it now is, and how much of its output changed.

    values: `tensor.dense32()` as torch `[out, in]`. error: ‖ΔW·X‖² / ‖W·X‖² by the inputs' second moment, or of the
    weight alone where a method was given none.
    """

    tensor: GroupedTensor
    values: torch.Tensor
    error: float

    def judged(self, weight: torch.Tensor, moment: torch.Tensor | None) -> Quantised:
        """The same codes, with their error against `weight`."""
        return replace(self, error=output_error(weight, self.values, moment))


# -- shapes ------------------------------------------------------------------------------------------------------
def by_group(weight: torch.Tensor, size: int) -> torch.Tensor:
    """`[out, in]` as `[out, groups, size]`."""
    return weight.reshape(weight.shape[0], -1, size)


def check_width(width: int, scheme: QuantScheme, name: str = "The weight") -> None:
    """Raise UsageError unless the scheme's groups fill a row of `width`, naming the nearest sizes that do."""
    size = scheme.group_size
    if size is None or width % size == 0:
        return
    fitting = [d for d in range(8, width + 1) if width % d == 0]
    lower, higher = [d for d in fitting if d < size], [d for d in fitting if d > size]
    near = [str(d) for d in (*lower[-1:], *higher[:1])]
    raise UsageError(
        f"{name} is {width} wide, which groups of {size} do not divide.",
        f"Choose groups of {' or '.join(near)}, or per channel.",
    )


def round_scale(scale: torch.Tensor, kind: ScaleType) -> torch.Tensor:
    """The nearest scales that `kind` holds; where that is none that can be used (0), the scale 1: codes then mean 0."""
    if kind == "float16":
        scale = scale.clamp(max=float(torch.finfo(torch.float16).max))
    rounded = scale.to(_TORCH[kind]).float()
    return torch.where(rounded > 0, rounded, 1.0)


# -- ranges ------------------------------------------------------------------------------------------------------
def minmax(weight: torch.Tensor, scheme: QuantScheme, minimum: Minimum = "zero_point", ratio: float = 1.0) -> Grid:
    """Each group's range times `ratio`: absmax / ((2^bits − 1) / 2) when symmetric, else max − min with 0 inside.

    The conventions are compressed-tensors' (`calculate_qparams`), as in `quant.rounding`.
    """
    groups = by_group(weight, scheme.group_size or weight.shape[1])
    top = float((1 << scheme.bits) - 1)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    if scheme.symmetric:
        return symmetric_grid(scheme, weight.shape[1], torch.maximum(-low, high) * ratio / (top / 2))
    if minimum == "free":
        floor = (low * ratio).to(_TORCH[scheme.scale_type]).float()
        scale = round_scale((high * ratio - floor) / top, scheme.scale_type)
        return Grid(scheme, weight.shape[1], scale, None, floor)
    low, high = low.clamp(max=0) * ratio, high.clamp(min=0) * ratio
    scale = round_scale((high - low) / top, scheme.scale_type)
    return Grid(scheme, weight.shape[1], scale, torch.round(-low / scale).clamp_(0, top))


def symmetric_grid(scheme: QuantScheme, width: int, scale: torch.Tensor) -> Grid:
    """The grid with these scales `[out, groups]`, once they are rounded to the scheme's type."""
    scale = round_scale(scale, scheme.scale_type)
    return Grid(scheme, width, scale, torch.full_like(scale, float(scheme.zero)))


def fit(
    weight: torch.Tensor,
    scheme: QuantScheme,
    how: Fit = "minmax",
    *,
    moment: torch.Tensor | None = None,
    minimum: Minimum = "zero_point",
) -> Grid:
    """The grid of a weight. `moment` is XᵀX of its inputs `[in, in]`, which "output" needs.

    "mse" takes, for each group, the share of its range (RATIOS) with the least ‖Δw‖²; "output" the one with the least
    Δw·H·Δwᵀ, H being the group's own block of the moment (AWQ's clip search, section 3.2, with the sum over samples
    done beforehand).
    """
    check_width(weight.shape[1], scheme)
    if how == "minmax":
        return minmax(weight, scheme, minimum)
    if how == "output":
        assert moment is not None, "a search by output error needs the inputs' second moment"
    blocks = None if how == "mse" or moment is None else diagonal_blocks(moment, scheme.group_size or weight.shape[1])
    step = max(1, _ROWS_AT_ONCE // weight.shape[1])
    parts = [_search(part, scheme, blocks, minimum) for part in torch.split(weight, step)]
    return _stack(parts)


def _search(weight: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor | None, minimum: Minimum) -> Grid:
    """The best of RATIOS for each group of these rows."""
    best: Grid | None = None
    least = torch.empty(0)
    for grid in _candidates(weight, scheme, minimum):
        change = by_group(grid.nearest(weight) - weight, grid.size)
        error = group_errors(change, blocks)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            scheme,
            best.width,
            torch.where(better, grid.scale, best.scale),
            None if grid.zero is None or best.zero is None else torch.where(better, grid.zero, best.zero),
            None if grid.minimum is None or best.minimum is None else torch.where(better, grid.minimum, best.minimum),
        )
    assert best is not None
    return best


def _candidates(weight: torch.Tensor, scheme: QuantScheme, minimum: Minimum) -> Iterator[Grid]:
    for ratio in RATIOS:
        yield minmax(weight, scheme, minimum, ratio)


def _stack(parts: list[Grid]) -> Grid:
    first = parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    floors = [part.minimum for part in parts if part.minimum is not None]
    return replace(
        first,
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
        minimum=torch.cat(floors) if floors else None,
    )


def diagonal_blocks(moment: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks `[groups, size, size]` on the diagonal of `[in, in]`."""
    count = moment.shape[0] // size
    index = torch.arange(count)
    return moment.view(count, size, count, size)[index, :, index]


def group_errors(change: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    """Squared error of each group, `[out, groups]`, of a change `[out, groups, size]`; of the weight if no blocks."""
    if blocks is None:
        return change.square().sum(dim=2)
    by_group = change.transpose(0, 1)
    return (torch.bmm(by_group, blocks) * by_group).sum(dim=2).T


# -- errors and results --------------------------------------------------------------------------------------------
def output_error(weight: torch.Tensor, changed: torch.Tensor, moment: torch.Tensor | None) -> float:
    """‖(W′ − W)·X‖² / ‖W·X‖² = tr(ΔW·XᵀX·ΔWᵀ) / tr(W·XᵀX·Wᵀ); of the weights alone without a moment."""
    change = changed - weight
    if moment is None:
        wrong, whole = change.square().sum(), weight.square().sum()
    else:
        wrong, whole = ((change @ moment) * change).sum(), ((weight @ moment) * weight).sum()
    return float(wrong.clamp(min=0) / whole) if whole > 0 else 0.0


def quantised(grid: Grid, codes: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor | None = None) -> Quantised:
    """The result that a method returns: codes as a GroupedTensor, values, and the error against `weight`.

    An asymmetric tensor with whole zero points has the scale type float32, as `quant.rounding` has it: its minima need
    more bits than its scales.
    """
    values = grid.values(codes)
    scheme, minimum = grid.scheme, None
    if not scheme.symmetric:
        floor = grid.minimum if grid.zero is None else -(grid.zero * grid.scale)
        assert floor is not None
        minimum = floor.numpy()
        if grid.zero is not None:
            scheme = replace(scheme, scale_type="float32")
    tensor = GroupedTensor(scheme, codes.to(torch.uint8).numpy(), np.ascontiguousarray(grid.scale.numpy()), minimum)
    return Quantised(tensor, values, output_error(weight, values, moment))
