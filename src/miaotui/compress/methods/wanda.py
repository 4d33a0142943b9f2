"""Wanda: the smallest products of a weight and the size of its input go, row by row (Sun et al. 2023, section 3)."""

from __future__ import annotations

import torch

from miaotui.compress.methods.sparsity import Sparsity


def wanda_scores(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """|W_ij| · ‖X_j‖₂ `[out, in]` (equation 1). The norms are roots of the diagonal of XᵀX."""
    return weight.abs() * moment.diagonal().clamp(min=0).sqrt()


def wanda(weight: torch.Tensor, sparsity: Sparsity, moment: torch.Tensor) -> torch.Tensor:
    """The weight `[out, in]` with the lowest scores of each row (or group) at 0; the others stay as they are."""
    return weight.masked_fill(sparsity.lowest(wanda_scores(weight, moment), by_row=True), 0.0)
