"""GPTQ: columns rounded one after the other, each one's error made good by those that follow.

Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. Groups are static (scales from the original weight, before any
ordering), so that an activation order needs no g_idx in the artefact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from miaotui.compress.methods.grid import Fit, Grid, Minimum, Quantised, fit, quantised
from miaotui.compress.methods.polish import Column, polish
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme

BLOCK = 64
"""Columns whose corrections to the rest are gathered into one product (section 3.3, step 2)."""
TRIES = 8
"""How often damping is raised, tenfold each time, when the factorisation fails."""


@dataclass(frozen=True)
class GptqOptions:
    """damping: share of the mean of the moment's diagonal that is added to it. order: columns by falling activation.

    fit: how ranges are chosen, see `grid.fit`. polish: turns of `polish.polish` afterwards. correct: where a recipe
    propagates, refit weights first to what the original gave (`compress.stages`).
    """

    damping: float = 0.01
    order: bool = True
    fit: Fit = "output"
    polish: int = 0
    correct: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"The damping is {self.damping}.", "Give a share from 0 to 1, such as 0.01.")
        if self.polish < 0:
            raise UsageError(f"Polishing is to take {self.polish} turns.", "Give 0 or more; 1 gains most.")


@dataclass(frozen=True, eq=False)
class Factor:
    """What GPTQ needs of a moment, shared by every weight with these inputs.

    root: R `[in, in]`, upper triangular, with H + damping = R·Rᵀ, rows and columns in `order`; dead: inputs that were
    always 0. damping: as in the options, or what it was raised to; added: that times the mean.
    """

    root: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    damping: float
    added: float

    @cached_property
    def upper(self) -> torch.Tensor:
        """U = R⁻¹: (H + damping)⁻¹ = Uᵀ·U."""
        inverse: torch.Tensor = torch.linalg.solve_triangular(self.root, torch.eye(len(self.root)), upper=True)
        return inverse


def factor(moment: torch.Tensor, options: GptqOptions = GptqOptions()) -> Factor:
    """Factor XᵀX, damped; more and more where it is too near singular for float32.

    The moment reversed is L·Lᵀ; reversed again, it is R·Rᵀ with R upper triangular.
    Raises UsageError for a moment that is not finite.
    """
    diagonal = moment.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise UsageError(
            "The calibration gave activations that are not finite.", "Check the model: does it answer sensibly?"
        )
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True) if options.order else torch.arange(len(diagonal))
    reverse = order.flip(0)
    damped = moment[reverse][:, reverse]
    diagonal = damped.diagonal()
    diagonal += dead[reverse].float()
    mean, damping, added = _mean(moment), options.damping, 0.0
    for _ in range(TRIES):
        diagonal += damping * mean - added
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            return Factor(lower.flip(0, 1), order, dead, damping, damping * mean)
        added = damping * mean
        damping *= 10
    raise AssertionError("a positive semidefinite matrix with ten million times its mean added is not definite")


def _mean(moment: torch.Tensor) -> float:
    """Of the diagonal, with 1 for an input that never occurs."""
    diagonal = moment.diagonal()
    return float(torch.where(diagonal <= 0, 1.0, diagonal).mean())


def gptq(
    weight: torch.Tensor,
    scheme: QuantScheme,
    moment: torch.Tensor,
    options: GptqOptions = GptqOptions(),
    *,
    shared: Factor | None = None,
    minimum: Minimum = "zero_point",
    grid: Grid | None = None,
) -> Quantised:
    """Codes of a weight `[out, in]` that keep its outputs, given XᵀX of its inputs `[in, in]`.

    Rows are independent: weights with the same inputs may be stacked along `out`, or share a `Factor`. `grid` is one
    already fitted.
    """
    shared = shared or factor(moment, options)
    alive = torch.where(shared.dead, 0.0, weight)
    grid = grid or fit(alive, scheme, options.fit, moment=moment, minimum=minimum)
    codes, lost = _solve(alive, grid, shared)
    if options.polish:
        damped = moment + shared.added * torch.eye(len(moment))
        grid, codes = polish(alive, grid, codes, damped, options.polish)
        return quantised(grid, codes, weight, moment)
    return quantised(grid, codes, weight, moment, lost)


def _solve(weight: torch.Tensor, grid: Grid, shared: Factor) -> tuple[torch.Tensor, float]:
    """The codes `[out, in]`, and ‖ΔW·X‖². Works on the transpose, where a column of the weight is contiguous.

    What column j is to be rounded from is the weight plus Σ_{k<j} (w_k − q_k)·R_kj / R_jj: the paper's rest, without
    an inverse (Chee et al. 2023, arXiv 2307.13304, theorem 6). What it is then off by, times R_jj, is what the column
    adds to the root of ‖ΔW·R‖².
    """
    target = weight.T[shared.order]
    feedback = shared.root / shared.root.diagonal()
    pivots = shared.root.diagonal()[:, None]
    order, columns, lost = shared.order.tolist(), Column(grid), 0.0
    changes, units = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), BLOCK):
        block = slice(start, start + BLOCK)
        rest = torch.addmm(target[block], feedback[:start, block].T, changes[:start])
        back = feedback[block, block].unbind()
        rows = zip(rest.unbind(), target[block].unbind(), changes[block].unbind(), units[block].unbind(), strict=True)
        for i, (column, exact, change, unit) in enumerate(rows):
            value = columns.nearest(column, order[start + i], unit)
            torch.sub(exact, value, out=change)
            rest[i + 1 :].addr_(back[i][i + 1 :], change)
        off = rest.sub_(target[block]).add_(changes[block]).mul_(pivots[block])
        lost += float(off.square_().sum())
    lost -= float(((shared.added + shared.dead[shared.order].float()) @ changes.square_()).sum())
    codes = torch.empty_like(units)
    codes[shared.order] = units
    return columns.codes(codes).T.contiguous(), max(0.0, lost)
