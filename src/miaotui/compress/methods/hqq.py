"""HQQ: ranges that ignore outliers, found without any data.

Badri and Shaji 2023, "Half-Quadratic Quantization": argmin ‖W − Q⁻¹(Q(W))‖_p^p with p < 1, split into a soft
threshold of the error (generalised, for p < 1) and a closed form for the zero point, in turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from miaotui.compress.methods.grid import (
    Grid,
    Minimum,
    Quantised,
    by_group,
    check_width,
    minmax,
    quantised,
    round_scale,
)
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme


@dataclass(frozen=True)
class HqqOptions:
    """p: the norm; beta, growth: weight of the quadratic term and what each turn multiplies it by; turns: at most."""

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    turns: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.beta <= 0 or self.growth < 1 or self.turns < 1:
            raise UsageError(
                f"HQQ cannot use p = {self.p}, beta = {self.beta}, growth = {self.growth}, turns = {self.turns}.",
                "Give p from 0 to 1, a positive beta, a growth of at least 1 and at least one turn.",
            )


def hqq(
    weight: torch.Tensor,
    scheme: QuantScheme,
    options: HqqOptions = HqqOptions(),
    *,
    minimum: Minimum = "zero_point",
    moment: torch.Tensor | None = None,
) -> Quantised:
    """Codes of a weight `[out, in]`; `moment` is only what the error is measured by.

    An asymmetric scheme keeps its min-max scales and moves its zero points, as the authors do, rounded at the end
    unless `minimum` is "free". A symmetric one has no zero point to move: its scales are fitted instead, by
    least squares on what the threshold leaves (our extension).
    """
    check_width(weight.shape[1], scheme)
    grid = minmax(weight, scheme, minimum)
    grid = _symmetric(weight, grid, options) if scheme.symmetric else _asymmetric(weight, grid, options)
    return quantised(grid, grid.codes(weight), weight, moment)


def shrink(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """sign(x) · max(0, |x| − |x|^(p−1) / beta): the generalised soft threshold."""
    size = x.abs()
    if p == 1:
        return torch.sign(x) * (size - 1 / beta).clamp_(min=0)
    return torch.sign(x) * (size - size.clamp(min=1e-12).pow(p - 1) / beta).clamp_(min=0)


def _asymmetric(weight: torch.Tensor, grid: Grid, options: HqqOptions) -> Grid:
    groups, scale = by_group(weight, grid.size), grid.scale[..., None]
    start = grid.zero if grid.zero is not None else -_floor(grid) / grid.scale
    zero = best = start[..., None]
    beta, least = options.beta, float("inf")
    for _ in range(options.turns):
        codes = torch.round(groups / scale + zero).clamp_(0, grid.top)
        change = groups - (codes - zero) * scale
        error = float(change.abs().mean())
        if error >= least:
            break
        least, best = error, zero
        zero = (codes - (groups - shrink(change, beta, options.p)) / scale).mean(dim=2, keepdim=True)
        beta *= options.growth
    found = best[..., 0]
    if grid.zero is None:
        return replace(grid, minimum=_rounded_floor(-found * grid.scale, grid.scheme))
    return replace(grid, zero=torch.round(found).clamp_(0, grid.top))


def _symmetric(weight: torch.Tensor, grid: Grid, options: HqqOptions) -> Grid:
    groups = by_group(weight, grid.size)
    middle, beta, least, best = float(grid.scheme.zero), options.beta, float("inf"), grid.scale
    scale = grid.scale
    for _ in range(options.turns):
        codes = (torch.round(groups / scale[..., None]) + middle).clamp_(0, grid.top) - middle
        change = groups - codes * scale[..., None]
        error = float(change.abs().mean())
        if error >= least:
            break
        least, best = error, scale
        target = groups - shrink(change, beta, options.p)
        fitted = (target * codes).sum(dim=2) / codes.square().sum(dim=2).clamp(min=1e-12)
        scale = round_scale(torch.where(fitted > 0, fitted, scale), grid.scheme.scale_type)
        beta *= options.growth
    return replace(grid, scale=best)


def _floor(grid: Grid) -> torch.Tensor:
    assert grid.minimum is not None
    return grid.minimum


def _rounded_floor(floor: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    return floor.to(kinds[scheme.scale_type]).float()
