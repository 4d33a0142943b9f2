"""Random problems for the solvers: weights, and inputs whose channels are correlated and of very unequal size."""

from __future__ import annotations

import torch


def weight(out: int, width: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05
    made[:, ::17] *= 4
    return made


def inputs(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width)
    x = torch.randn(rows, width, generator=g) @ mixing
    x[:, ::13] *= 12
    return x


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def relative_error(w: torch.Tensor, changed: torch.Tensor, x: torch.Tensor) -> float:
    """By its definition, from the inputs themselves, in float64."""
    good, bad = x.double() @ w.double().T, x.double() @ changed.double().T
    return float((bad - good).square().sum() / good.square().sum())
