"""What training of scales and norms changes, and what its loss asks of that: everything else of a model is fixed.

A scale, and the weight of a norm, is multiplied by e^r, r being learnt from 0 on: steps are relative, and a scale stays
positive. Codes stay as a rounder left them, so that a weight moves with its whole group (EfficientQAT, Chen et al.
2024, arXiv 2407.11062, section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from miaotui.compress.methods.grid import by_group, round_scale
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import GroupedTensor


@dataclass(frozen=True)
class ScalesOptions:
    """windows: of the calibration's source, beside those that the rounding saw: on its own it errs less than elsewhere,
    and would teach nothing. epochs: how often each is learnt from; batch: windows a step. rate: of the scales,
    norm_rate: of the norms' weights, both relative; they fall linearly to 0.
    """

    windows: int = 64
    epochs: int = 2
    batch: int = 2
    rate: float = 0.001
    norm_rate: float = 0.001

    def __post_init__(self) -> None:
        rates = (self.rate, self.norm_rate)
        whole = min(self.windows, self.epochs, self.batch) >= 1
        if not whole or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise UsageError(
                f"Scales cannot be trained on {self.windows} windows for {self.epochs} epochs, {self.batch} a step, at "
                f"the rates {self.rate} and {self.norm_rate}.",
                "Give at least one window, one epoch and one window a step, and rates of at least 0.",
            )


def rescaled(tensor: GroupedTensor, ratio: torch.Tensor, scheme: QuantScheme, *, free: bool) -> GroupedTensor:
    """The same codes with scales times e^ratio `[out, groups]`, rounded as `scheme` stores them.

    free: the minimum is any number, and stays; else it is a whole number of scales, and stays that.
    """
    before = torch.from_numpy(np.array(tensor.scale, np.float32))
    scale = torch.where(ratio == 0, before, round_scale(before * ratio.exp(), scheme.scale_type)).numpy()
    if tensor.minimum is None or free:
        return replace(tensor, scale=scale)
    zero = np.rint(-tensor.minimum / tensor.scale)
    return replace(tensor, scale=scale, minimum=-(zero * scale))


def ratio_gradient(weight: torch.Tensor, gradient: torch.Tensor, tensor: GroupedTensor, *, free: bool) -> torch.Tensor:
    """∂L/∂r `[out, groups]`, from `weight` `[out, in]`, which is what the rescaled `tensor` means, and ∂L/∂weight.

    ∂w/∂r is w less a minimum that stays; the rounding of scales passes gradients straight through (Bengio et al. 2013).
    """
    size = weight.shape[1] // tensor.scale.shape[1]
    moved = by_group(weight, size)
    if free and tensor.minimum is not None:
        moved = moved - torch.from_numpy(np.array(tensor.minimum, np.float32))[..., None]
    return (moved * by_group(gradient, size)).sum(dim=2)
