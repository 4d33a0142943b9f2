"""Equivalent weights: what one linear's inputs are divided by, another weight before them takes up.

Scales are `[in]`, positive: the inputs become x / s and the weight W · diag(s), which changes no output.
"""

from __future__ import annotations

import torch


def into_columns(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The linear that takes x / s: `W · diag(s)`."""
    return weight * scale


def into_norm(weight: torch.Tensor, scale: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """The norm weight that gives x / s; `offset` is what the norm adds to its stored weight (Gemma: 1)."""
    return (weight + offset) / scale - offset


def into_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The linear (`[out, in]`), or its bias (`[out]`), whose outputs are those inputs: row j divided by s_j."""
    return weight / (scale[:, None] if weight.ndim == 2 else scale)


def into_moment(moment: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """XᵀX of the inputs divided by s."""
    return moment / (scale[:, None] * scale)


def shared_by_heads(values: torch.Tensor, kv_heads: int, head_dim: int, how: str = "mean") -> torch.Tensor:
    """`values` `[heads · head_dim]` made equal over the query heads that read the same value head.

    The output projection's inputs come from values that several heads share, so that a scale can only be folded into
    the values' rows if these heads agree on it. how: "mean" or "max".
    """
    by_head = values.view(kv_heads, -1, head_dim)
    one = by_head.mean(dim=1) if how == "mean" else by_head.amax(dim=1)
    return one[:, None].expand_as(by_head).reshape(-1)


def value_rows(scale: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """The scale `[kv_heads · head_dim]` of the values' rows for one shared by heads `[heads · head_dim]`."""
    return scale.view(kv_heads, -1, head_dim)[:, 0].reshape(-1)
