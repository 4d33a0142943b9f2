"""SmoothQuant: outliers moved from the activations, which have one scale per token, into the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from miaotui.errors import UsageError


def smooth(weights: Sequence[torch.Tensor], peak: torch.Tensor, strength: float = 0.5) -> torch.Tensor:
    """s_j = max|x_j|^α / max|w_j|^(1−α) `[in]`, for weights that share their inputs.

    Xiao et al. 2022 (arXiv 2211.10438), equation 4. `peak` is max|x| of each input; α is `strength`. The inputs are to
    be divided by s, the weights' columns multiplied (see `fold`). Inputs that never occur, or that no weight reads,
    keep the scale 1.
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"SmoothQuant's strength is {strength}.", "Give a number from 0 to 1, such as 0.5.")
    weight = torch.stack([w.abs().amax(dim=0) for w in weights]).amax(dim=0)
    usable = (peak > 1e-5) & (weight > 1e-5)
    scale = peak.clamp(min=1e-5).pow(strength) / weight.clamp(min=1e-5).pow(1 - strength)
    return torch.where(usable, scale.clamp(min=1e-5), 1.0)
