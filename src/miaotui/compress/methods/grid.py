"""Grids: the scale and zero point of every group of a weight, fitted, and the codes that they give.

Weights are `[out, in]` float32. Everything is computed with scales already rounded to the scheme's scale type, so that
what a method minimises is what the artefact holds.
"""

from __future__ import annotations

from collections.abc import Sequence
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

COARSE = tuple(0.82**i for i in range(6))
"""Shares of the full range that a search tries first, widest first: 1 to 0.37."""
FINE = (0.07, 0.04, 0.02)
"""By how much it then moves each group's best share down and up, step after step."""

_TORCH: dict[ScaleType, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
STRIPS = 6
"""Of a second moment, one product each: 7/12 of the work of the whole."""
_ELEMENTS_AT_ONCE = 1 << 17
"""That a search keeps in the cache."""


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
    return Grid(
        scheme, weight.shape[1], *_ranged(scheme, minimum, groups.amin(dim=2) * ratio, groups.amax(dim=2) * ratio)
    )


def _ranged(
    scheme: QuantScheme, minimum: Minimum, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scales, zero points and minima for groups from `low` to `high`, all of one shape."""
    top = float((1 << scheme.bits) - 1)
    if scheme.symmetric:
        scale = round_scale(torch.maximum(-low, high) / (top / 2), scheme.scale_type)
        return scale, torch.full_like(scale, float(scheme.zero)), None
    if minimum == "free":
        floor = low.to(_TORCH[scheme.scale_type]).float()
        return round_scale((high - floor) / top, scheme.scale_type), None, floor
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = round_scale((high - low) / top, scheme.scale_type)
    return scale, torch.round(-low / scale).clamp_(0, top), None


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

    "mse" takes, for each group, the share of its range with the least ‖Δw‖²; "output" the one with the least Δw·H·Δwᵀ,
    H being the group's own block of the moment (AWQ's clip search, section 3.2, with the sum over samples done
    beforehand). The shares are COARSE, then FINE around each group's best.
    """
    check_width(weight.shape[1], scheme)
    if how == "minmax":
        return minmax(weight, scheme, minimum)
    if how == "output":
        assert moment is not None, "a search by output error needs the inputs' second moment"
    blocks = None if how == "mse" or moment is None else diagonal_blocks(moment, scheme.group_size or weight.shape[1])
    step = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    found = [_Search(part, scheme, blocks, minimum).found() for part in torch.split(weight, step)]
    scale, zero, floor = (_joined([one[i] for one in found]) for i in range(3))
    assert scale is not None
    return Grid(scheme, weight.shape[1], scale, zero, floor)


class _Search:
    """The best share of its range for each group of a few rows. Works on `[groups, out, size]`."""

    def __init__(self, weight: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor | None, minimum: Minimum):
        self._scheme, self._minimum, self._blocks = scheme, minimum, blocks
        self._groups = by_group(weight, scheme.group_size or weight.shape[1]).transpose(0, 1).contiguous()
        self._low, self._high = self._groups.amin(dim=2), self._groups.amax(dim=2)
        self._change, self._product = torch.empty_like(self._groups), torch.empty_like(self._groups)
        self._share = torch.ones_like(self._low)
        self._least = torch.full_like(self._low, float("inf"))
        self._best = _ranged(scheme, minimum, self._low, self._high)

    def found(self) -> tuple[torch.Tensor | None, ...]:
        """Scale, zero point and minimum, `[out, groups]`."""
        for share in COARSE:
            self._offer(torch.full_like(self._low, share))
        for step in FINE:
            middle = self._share
            self._offer(middle * (1 - step))
            self._offer(middle * (1 + step))
        return tuple(None if part is None else part.T for part in self._best)

    def _offer(self, share: torch.Tensor) -> None:
        """Take it where it is better."""
        grid = _ranged(self._scheme, self._minimum, self._low * share, self._high * share)
        error = self._error(*grid)
        better = error < self._least
        self._least, self._share = torch.where(better, error, self._least), torch.where(better, share, self._share)
        self._best = _chosen(better, grid, self._best)

    def _error(self, scale: torch.Tensor, zero: torch.Tensor | None, floor: torch.Tensor | None) -> torch.Tensor:
        groups, top, scale = self._groups, float((1 << self._scheme.bits) - 1), scale[..., None]
        change = self._change
        if self._scheme.symmetric:
            middle = float(self._scheme.zero)
            torch.div(groups, scale, out=change).round_().clamp_(-middle, top - middle).mul_(scale)
        elif zero is not None:
            torch.div(groups, scale, out=change).round_().add_(zero[..., None]).clamp_(0, top)
            change.sub_(zero[..., None]).mul_(scale)
        else:
            assert floor is not None
            torch.sub(groups, floor[..., None], out=change).div_(scale).round_().clamp_(0, top)
            change.mul_(scale).add_(floor[..., None])
        change.sub_(groups)
        if self._blocks is None:
            return torch.mul(change, change, out=self._product).sum(dim=2)
        return torch.bmm(change, self._blocks, out=self._product).mul_(change).sum(dim=2)


_Parts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _chosen(better: torch.Tensor, new: _Parts, old: _Parts) -> _Parts:
    zero = None if new[1] is None or old[1] is None else torch.where(better, new[1], old[1])
    floor = None if new[2] is None or old[2] is None else torch.where(better, new[2], old[2])
    return torch.where(better, new[0], old[0]), zero, floor


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def diagonal_blocks(moment: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks `[groups, size, size]` on the diagonal of `[in, in]`."""
    count = moment.shape[0] // size
    index = torch.arange(count)
    return moment.view(count, size, count, size)[index, :, index]


# -- errors and results --------------------------------------------------------------------------------------------
def output_error(weight: torch.Tensor, changed: torch.Tensor, moment: torch.Tensor | None) -> float:
    """‖(W′ − W)·X‖² / ‖W·X‖² = tr(ΔW·XᵀX·ΔWᵀ) / tr(W·XᵀX·Wᵀ); of the weights alone without a moment."""
    change = changed - weight
    if moment is None:
        wrong, whole = change.square().sum(), weight.square().sum()
    else:
        wrong, whole = _energy(change, moment), _energy(weight, moment)
    return float(wrong.clamp(min=0) / whole) if whole > 0 else 0.0


def _energy(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """tr(M·H·Mᵀ) of M `[out, in]`. H is symmetric, so that strips of it up to the diagonal are enough."""
    total, step = torch.zeros(()), -(-len(moment) // STRIPS)
    for start in range(0, len(moment), step):
        strip = rows[:, start : start + step]
        part = strip @ moment[start : start + step, start : start + step]
        if start:
            part.addmm_(rows[:, :start], moment[:start, start : start + step], alpha=2)
        total += part.mul_(strip).sum()
    return total


def quantised(
    grid: Grid,
    codes: torch.Tensor,
    weight: torch.Tensor,
    moment: torch.Tensor | None = None,
    lost: float | None = None,
) -> Quantised:
    """The result that a method returns: codes as a GroupedTensor, values, and the error against `weight`.

    `lost` is ‖ΔW·X‖², where the method knows it.

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
    if lost is None or moment is None:
        return Quantised(tensor, values, output_error(weight, values, moment))
    whole = float(_energy(weight, moment))
    return Quantised(tensor, values, lost / whole if whole > 0 else 0.0)
