"""What a rounder left, improved: scales by least squares and codes one column at a time, in turns.

Both steps lower ‖ΔW·X‖² = tr(ΔW·H·ΔWᵀ) and never raise it, but for the rounding of scales to their type. Codes: exact
coordinate descent, as in QuantEase (Behdin et al. 2023, arXiv 2309.01885, algorithm 1). Scales: given the codes, a
row's output is linear in its scales, one least-squares problem of as many unknowns as the row has groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from miaotui.compress.methods.grid import Grid, by_group, round_scale

BLOCK = 128
"""Columns whose changes reach the rest in one product."""
ROWS_BYTES = 1 << 26
"""Bytes of the normal equations of the rows that are solved together."""
RIDGE = 1e-3
"""How much a scale is held to where it was, as a share of its own part of the error."""
FURTHEST = 2.0
"""A scale that moves by more than this factor stays as it was: its group's equations say nothing."""


def polish(
    weight: torch.Tensor, grid: Grid, codes: torch.Tensor, moment: torch.Tensor, turns: int
) -> tuple[Grid, torch.Tensor]:
    """The grid and codes `[out, in]` after `turns` of codes, scales and codes again. moment: H, damped as one likes."""
    for turn in range(turns):
        if turn == 0:
            codes = descend(weight, grid, codes, moment)
        grid = refit(weight, grid, codes, moment)
        codes = descend(weight, grid, codes, moment)
    return grid, codes


def refit(weight: torch.Tensor, grid: Grid, codes: torch.Tensor, moment: torch.Tensor) -> Grid:
    """The scales with the least output error for these codes; zero points and minima stay.

    With z the codes less their zero point and F the free minima, row w is to be Σ_g s_g·z_g + F: the equations are
    (z_gᵀ·H_gk·z_k)·s = z_gᵀ·(H·(w − F))_g.
    """
    step = max(1, ROWS_BYTES // (4 * grid.scale.shape[1] ** 2))
    scales = [
        _scales(weight[i : i + step], grid.rows(slice(i, i + step)), codes[i : i + step], moment)
        for i in range(0, len(weight), step)
    ]
    scale = torch.cat(scales)
    usable = (scale > grid.scale / FURTHEST) & (scale < grid.scale * FURTHEST)
    return replace(grid, scale=round_scale(torch.where(usable, scale, grid.scale), grid.scheme.scale_type))


def _scales(weight: torch.Tensor, grid: Grid, codes: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    rows, count = grid.scale.shape
    unit = by_group(codes, grid.size)
    target = weight
    if grid.zero is not None:
        unit = unit - grid.zero[..., None]
    else:
        assert grid.minimum is not None
        target = (by_group(weight, grid.size) - grid.minimum[..., None]).flatten(1)
    flat = unit.flatten(1)
    equations = torch.empty(rows, count, count)
    for group in range(count):
        columns = slice(group * grid.size, (group + 1) * grid.size)
        equations[:, group] = by_group((flat[:, columns] @ moment[columns]) * flat, grid.size).sum(dim=2)
    wanted = by_group((target @ moment) * flat, grid.size).sum(dim=2)
    diagonal = equations.diagonal(dim1=1, dim2=2)
    least = 1e-6 * diagonal.mean(dim=1, keepdim=True).clamp(min=1e-30)
    hold = RIDGE * torch.maximum(diagonal, least)
    diagonal += hold
    solved, failed = torch.linalg.solve_ex(equations, (wanted + hold * grid.scale)[..., None])
    return torch.where((failed == 0)[:, None], solved[..., 0], grid.scale)


def descend(weight: torch.Tensor, grid: Grid, codes: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Each column in turn set to its best codes, all others being as they are.

    With R = H·(W − Q)ᵀ `[in, out]`, the best value for column j is q_j + R_j / H_jj, rounded. R is kept up to date
    within a block at once, beyond it block by block. Inputs that never occur keep their codes.
    """
    width = weight.shape[1]
    values, column = grid.values(codes).T.contiguous(), Column(grid)
    units = column.units(codes.T.contiguous())
    rest = moment @ (weight.T - values)
    pivots = moment.diagonal().tolist()
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        moves = torch.zeros(end - start, weight.shape[0])
        for i in range(start, end):
            if pivots[i] <= 0:
                continue
            value = column.nearest(torch.add(values[i], rest[i], alpha=1 / pivots[i]), i, units[i])
            torch.sub(value, values[i], out=moves[i - start])
            values[i] = value
            if i + 1 < end:
                rest[i + 1 : end].addr_(moment[i + 1 : end, i], moves[i - start], alpha=-1)
        if end < width:
            rest[end:].addmm_(moment[end:, start:end], moves, alpha=-1)
    return column.codes(units).T.contiguous()


class Column:
    """Nearest values in one column of the weight, `[out]`. Units are codes less their zero point, if they have one."""

    def __init__(self, grid: Grid) -> None:
        self._size, top = grid.size, float(grid.top)
        self._scales = grid.scale.T.contiguous().unbind()
        self._zeros = None if grid.zero is None else grid.zero.T.contiguous()
        self._floors = None if grid.minimum is None else grid.minimum.T.contiguous().unbind()
        self._limits: list[tuple[Any, Any]] = [(0.0, top)] * len(self._scales)
        if grid.scheme.symmetric:
            self._limits = [(-float(grid.scheme.zero), top - grid.scheme.zero)] * len(self._scales)
        elif self._zeros is not None:
            self._limits = [(-zero, top - zero) for zero in self._zeros]

    def nearest(self, column: torch.Tensor, index: int, unit: torch.Tensor) -> torch.Tensor:
        """What the nearest codes mean; these are left in `unit`."""
        group = index // self._size
        scale, (low, high) = self._scales[group], self._limits[group]
        if self._floors is None:
            torch.div(column, scale, out=unit).round_().clamp_(low, high)
            return torch.mul(unit, scale)
        torch.sub(column, self._floors[group], out=unit).div_(scale).round_().clamp_(low, high)
        return torch.addcmul(self._floors[group], unit, scale)

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        """From units `[in, out]`, in place."""
        if self._zeros is not None:
            by_group = units.view(len(self._zeros), -1, units.shape[1])
            by_group += self._zeros[:, None]
        return units

    def units(self, codes: torch.Tensor) -> torch.Tensor:
        """From codes `[in, out]`."""
        if self._zeros is None:
            return codes.clone()
        return (codes.view(len(self._zeros), -1, codes.shape[1]) - self._zeros[:, None]).flatten(0, 1)
