"""SparseGPT: weights set to 0 column by column, each error made good by the columns that follow.

Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1: GPTQ's solver, with 0 in place of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miaotui.compress.methods.gptq import Factor, GptqOptions, factor
from miaotui.compress.methods.sparsity import Sparsity
from miaotui.errors import UsageError


@dataclass(frozen=True)
class SparseGptOptions:
    """damping: as GPTQ's. block: columns whose mask is chosen together (the paper's B_s)."""

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"The damping is {self.damping}.", "Give a share from 0 to 1, such as 0.01.")
        if self.block < 1:
            raise UsageError(f"The block is {self.block}.", "Give a number of columns, such as 128.")


def shared_factor(moment: torch.Tensor, options: SparseGptOptions = SparseGptOptions()) -> Factor:
    """What every weight with these inputs needs of their XᵀX `[in, in]`; columns in their own order."""
    return factor(moment, GptqOptions(damping=options.damping, order=False))


def sparsegpt(
    weight: torch.Tensor,
    sparsity: Sparsity,
    shared: Factor,
    options: SparseGptOptions = SparseGptOptions(),
) -> torch.Tensor:
    """The weight `[out, in]`, sparse, its other elements moved so that its outputs stay near.

    Without a pattern, the mask of each block of columns takes `share` of it over all rows. With one, each group's is
    chosen when its columns come up. Inputs that were always 0 lose their weights.
    """
    sparsity.check(weight.shape[1])
    rest = torch.where(shared.dead, 0.0, weight).T.contiguous()
    step = options.block if sparsity.of is None else -(-options.block // sparsity.of) * sparsity.of
    for start in range(0, len(rest), step):
        end = min(start + step, len(rest))
        errors = _solve_block(rest[start:end], shared.upper[start:end, start:end], sparsity)
        if end < len(rest):
            rest[end:].addmm_(shared.upper[start:end, end:].T, errors, alpha=-1)
    return rest.T.contiguous()


def _solve_block(columns: torch.Tensor, upper: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Prune the columns `[block, out]` of a block in place; returns their errors over pivots, for those that follow."""
    pivots = upper.diagonal()
    gone = torch.zeros_like(columns, dtype=torch.bool)
    if sparsity.of is None:
        gone = sparsity.lowest(_costs(columns, pivots), by_row=False)
    errors = torch.empty_like(columns)
    for i, pivot in enumerate(pivots.tolist()):
        if sparsity.of is not None and i % sparsity.of == 0:
            group = slice(i, i + sparsity.of)
            gone[group] = sparsity.lowest(_costs(columns[group], pivots[group]).T, by_row=True).T
        kept = columns[i].masked_fill(gone[i], 0.0)
        errors[i] = (columns[i] - kept) / pivot
        columns[i] = kept
        if i + 1 < len(columns):
            columns[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _costs(columns: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """What it costs to set each weight to 0 when the following ones make up for it: w² / (U_jj)² (section 3.2)."""
    return (columns / pivots[:, None]).square()
