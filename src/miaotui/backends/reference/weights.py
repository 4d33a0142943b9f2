"""Prepared weights of the reference backend: float matrices that remember how their integers were stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miaotui.quant.tensor import DenseTensor, GroupedTensor, Tensor

ACTIVATION_GROUP = 32
"""Neighbouring inputs that share a scale when activations are quantised."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One stored matrix `[out, in]`, dequantised.

    `integer` says that its stored form is integer codes, so that its input is quantised too on the fast path, by token
    if the checkpoint says so; `perm` is the order in which those codes meet the input (None: as it comes).
    """

    weight: torch.Tensor
    integer: bool
    perm: torch.Tensor | None = None
    by_token: bool = False

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def apply(self, x: torch.Tensor, *, quantise: bool) -> torch.Tensor:
        """`x @ weight.T` in float32 for x `[rows, in]`, with x quantised first where the fast path would do so."""
        if quantise and self.integer:
            x = quantise_tokens(x) if self.by_token else quantise_activations(x, self.perm)
        return (x.to(self.weight.dtype) @ self.weight.T).float()


@dataclass(frozen=True, eq=False)
class Linear:
    """Matrices stacked along `out`, and one bias for all of them."""

    parts: tuple[Matrix, ...]
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def apply(self, x: torch.Tensor, *, quantise: bool) -> torch.Tensor:
        columns = [part.apply(x, quantise=quantise) for part in self.parts]
        y = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        return y if self.bias is None else y + self.bias


def quantise_tokens(x: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]` as int8 with one scale a row, and back: s·q with s = absmax / 127, q to the nearest even."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(x / torch.where(scale == 0, 1.0, scale)) * scale


def quantise_activations(x: torch.Tensor, perm: torch.Tensor | None = None) -> torch.Tensor:
    """x `[rows, in]` as the fast path's dynamic int8 sees it: s·q with s = absmax / 127 per 32 neighbours.

    q = round-to-nearest-even(x / s). The last group of a row may be short; a group of zeros stays zero. With
    `perm` the neighbours are those of `x[:, perm]`; the result is in x's own order.
    """
    if perm is not None:
        ordered = quantise_activations(x[:, perm])
        return torch.empty_like(ordered).index_copy_(1, perm, ordered)
    width = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -width % ACTIVATION_GROUP))
    groups = padded.view(x.shape[0], -1, ACTIVATION_GROUP)
    scale = groups.abs().amax(dim=2, keepdim=True) / 127
    codes = torch.round(groups / torch.where(scale == 0, 1.0, scale))
    return (codes * scale).view(padded.shape)[:, :width]


def matrix(tensor: Tensor, device: torch.device, half: bool) -> Matrix:
    """Load one tensor. With `half` it is held in 16 bits (its own kind if it has one, else bfloat16)."""
    dtype = torch.float32
    if half:
        dtype = torch.float16 if isinstance(tensor, DenseTensor) and tensor.type == "float16" else torch.bfloat16
        if isinstance(tensor, DenseTensor) and tensor.type == "float32":
            dtype = torch.float32
    weight = torch.from_numpy(tensor.dense32()).to(device=device, dtype=dtype)
    perm = tensor.perm if isinstance(tensor, GroupedTensor) else None
    order = None if perm is None else torch.from_numpy(perm).to(device=device, dtype=torch.int64)
    by_token = isinstance(tensor, GroupedTensor) and tensor.by_token
    return Matrix(weight, integer=not isinstance(tensor, DenseTensor), perm=order, by_token=by_token)
