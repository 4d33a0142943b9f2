"""Prepared weights of the reference backend: float matrices that remember how their integers were stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miaotui.quant.tensor import DenseTensor, GroupedTensor, Tensor

ACTIVATION_GROUP = 32
"""Neighbouring inputs that share a scale when activations are quantised."""

WIDE_GROUP = 64
"""The same where recoded weights are multiplied: `Matrix.wide`."""

TURN = 32
"""Neighbouring inputs that are turned together there, and their weights with them."""

WIDE_FROM = 16
"""Rows from which on they are."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One stored matrix `[out, in]`, dequantised.

    `integer` says that its stored form is integer codes, so that its input is quantised too on the fast path, by token
    if the checkpoint says so; `perm` is the order in which those codes meet the input (None: as it comes). `wide` is
    the weight as `--compute int8-batch` recodes it for many rows, for inputs in that order and turned.
    """

    weight: torch.Tensor
    integer: bool
    perm: torch.Tensor | None = None
    by_token: bool = False
    wide: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def apply(self, x: torch.Tensor, *, quantise: bool, wide: bool = False) -> torch.Tensor:
        """`x @ weight.T` in float32 for x `[rows, in]`, with x quantised first where the fast path would do so."""
        if quantise and wide and self.wide is not None and len(x) >= WIDE_FROM:
            ordered = x if self.perm is None else x[:, self.perm]
            return quantise_activations(turned(ordered), group=WIDE_GROUP) @ self.wide.T
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

    def apply(self, x: torch.Tensor, *, quantise: bool, wide: bool = False) -> torch.Tensor:
        columns = [part.apply(x, quantise=quantise, wide=wide) for part in self.parts]
        y = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        return y if self.bias is None else y + self.bias


def quantise_tokens(x: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]` as int8 with one scale a row, and back: s·q with s = absmax / 127, q to the nearest even."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(x / torch.where(scale == 0, 1.0, scale)) * scale


def quantise_activations(
    x: torch.Tensor, perm: torch.Tensor | None = None, group: int = ACTIVATION_GROUP
) -> torch.Tensor:
    """x `[rows, in]` as the fast path's dynamic int8 sees it: s·q with s = absmax / 127 per `group` neighbours.

    q = round-to-nearest-even(x / s). The last group of a row may be short; a group of zeros stays zero. With
    `perm` the neighbours are those of `x[:, perm]`; the result is in x's own order.
    """
    if perm is not None:
        ordered = quantise_activations(x[:, perm], group=group)
        return torch.empty_like(ordered).index_copy_(1, perm, ordered)
    width = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -width % group))
    groups = padded.view(x.shape[0], -1, group)
    scale = groups.abs().amax(dim=2, keepdim=True) / 127
    codes = torch.round(groups / torch.where(scale == 0, 1.0, scale))
    return (codes * scale).view(padded.shape)[:, :width]


def turned(x: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]`, filled up with zeros to whole runs of 32, each run by its Walsh-Hadamard transform (unscaled).

    Sums and differences of elements 16, 8, 4, 2 and 1 apart, in this order. Twice is 32 times x.
    """
    y = torch.nn.functional.pad(x, (0, -x.shape[1] % TURN))
    apart = TURN // 2
    while apart:
        pairs = y.view(len(y), -1, 2, apart)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).view(y.shape)
        apart //= 2
    return y


def recoded(tensor: Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Integer weights in stored order, turned and divided by 32, as int8 with one scale a row, and back: s·q with
    s = absmax / 127, q to the nearest even. None where they are no integers, or their inputs are coded by token."""
    if isinstance(tensor, DenseTensor) or (isinstance(tensor, GroupedTensor) and tensor.by_token):
        return None
    perm = tensor.perm if isinstance(tensor, GroupedTensor) else None
    stored = weight.float() if perm is None else weight[:, torch.from_numpy(perm).to(weight.device)].float()
    stored = turned(stored) / TURN
    most = stored.abs().amax(dim=1, keepdim=True)
    units = torch.where(most == 0, 0.0, torch.tensor(127.0) / most)  # not 127 / most, which PyTorch rounds twice
    return torch.round(stored * units) * (most / 127)


def matrix(tensor: Tensor, device: torch.device, half: bool, wide: bool = False) -> Matrix:
    """Load one tensor. With `half` it is held in 16 bits (its own kind if it has one, else bfloat16); with `wide` also
    as it is recoded for many rows."""
    dtype = torch.float32
    if half:
        dtype = torch.float16 if isinstance(tensor, DenseTensor) and tensor.type == "float16" else torch.bfloat16
        if isinstance(tensor, DenseTensor) and tensor.type == "float32":
            dtype = torch.float32
    weight = torch.from_numpy(tensor.dense32()).to(device=device, dtype=dtype)
    perm = tensor.perm if isinstance(tensor, GroupedTensor) else None
    order = None if perm is None else torch.from_numpy(perm).to(device=device, dtype=torch.int64)
    by_token = isinstance(tensor, GroupedTensor) and tensor.by_token
    other = recoded(tensor, weight) if wide else None
    return Matrix(weight, not isinstance(tensor, DenseTensor), order, by_token, other)
