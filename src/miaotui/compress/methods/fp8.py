"""fp8 (e4m3fn): weights with a scale per output channel, activations with one per token; scales of a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from miaotui.compress.methods.grid import output_error, round_scale
from miaotui.compress.types import Fp8Tensor
from miaotui.quant.scheme import ScaleType

LARGEST = 448.0
"""The largest number of e4m3fn, which has no infinity."""


@dataclass(frozen=True, eq=False)
class Float8:
    """A weight in e4m3 codes, what it now is (codes · scale, `[out, in]` float32), and its error as in `Quantised`."""

    tensor: Fp8Tensor
    values: torch.Tensor
    error: float


def fp8_weight(weight: torch.Tensor, scale_type: ScaleType = "bfloat16", moment: torch.Tensor | None = None) -> Float8:
    """Each row divided by absmax / 448, a number that `scale_type` holds, and rounded to nearest, ties to even."""
    scale = round_scale(weight.abs().amax(dim=1, keepdim=True) / LARGEST, scale_type)
    codes = _cast(weight / scale)
    values = codes.float() * scale
    tensor = Fp8Tensor(codes.view(torch.uint8).numpy(), scale.numpy())
    return Float8(tensor, values, output_error(weight, values, moment))


def fp8_activations(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x `[…, width]` as fp8 activations have it: one scale for each token, absmax / 448, or a static `scale`.

    Gradients pass as if nothing had been rounded.
    """
    if scale is None:
        scale = x.detach().abs().amax(dim=-1, keepdim=True) / LARGEST
        scale = torch.where(scale > 0, scale, 1.0)
    return _straight_through(x, _cast(x.detach() / scale).float() * scale)


def int8_activations(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x `[…, width]` as int8 activations have it: one scale for each token, absmax / 127.5, or a static `scale`.

    The range is compressed-tensors': −128 to 127. Gradients pass as if nothing had been rounded.
    """
    if scale is None:
        scale = x.detach().abs().amax(dim=-1, keepdim=True) / 127.5
    scale = torch.where(scale > 0, scale, 1.0)
    return _straight_through(x, torch.round(x.detach() / scale).clamp_(-128, 127) * scale)


def _straight_through(x: torch.Tensor, coded: torch.Tensor) -> torch.Tensor:
    """`coded`, with the gradient of x (Bengio et al. 2013, arXiv 1308.3432)."""
    return coded + (x - x.detach()) if x.requires_grad else coded


def static_scale(peak: torch.Tensor | float, kind: Literal["int8", "fp8"]) -> float:
    """One scale for activations, keys or values whose largest magnitude in calibration was `peak`."""
    largest = float(torch.as_tensor(peak).max())
    return largest / (LARGEST if kind == "fp8" else 127.5) or 1.0


def _cast(x: torch.Tensor) -> torch.Tensor:
    """To e4m3fn, beyond its range to its largest: the cast alone would give nan there."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
