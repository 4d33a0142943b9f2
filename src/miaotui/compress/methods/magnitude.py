"""Pruning by size alone: the smallest weights of a matrix go (Han et al. 2015). What others are measured against."""

from __future__ import annotations

import torch

from miaotui.compress.methods.sparsity import Sparsity


def magnitude(weight: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """The weight `[out, in]` with its smallest elements at 0, compared over the whole matrix."""
    return weight.masked_fill(sparsity.lowest(weight.abs(), by_row=False), 0.0)
