"""AWQ: inputs that are large on average get finer weights, by scaling them up before rounding.

Lin et al. 2023 (arXiv 2306.00978), section 3.2: s = mean|x|^α, α by grid search on the output's error. That error is
taken from XᵀX, so that no activations are needed: ‖ΔW·X‖² = tr(ΔW·XᵀX·ΔWᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from miaotui.compress.methods.fold import into_moment
from miaotui.compress.methods.grid import Fit, Minimum, check_width, fit
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme


@dataclass(frozen=True)
class AwqOptions:
    """steps: how many α between 0 and 1. weights: try s = mean|x|^α / mean|w|^(1−α) too (as AutoAWQ's duo scaling).

    rows: outputs that the search looks at, evenly spread, of each weight. fit: the ranges that it rounds with; best
    those that the rounder will have.
    """

    steps: int = 10
    weights: bool = False
    rows: int = 32
    fit: Fit = "output"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1:
            raise UsageError(f"AWQ's steps are {self.steps} and its rows {self.rows}.", "Give at least 1 of each.")


@dataclass(frozen=True, eq=False)
class Scaled:
    """The scale `[in]` that was found, its α, and the relative output error without and with it."""

    scale: torch.Tensor
    alpha: float
    before: float
    after: float


def awq(
    weights: Sequence[torch.Tensor],
    scheme: QuantScheme,
    moment: torch.Tensor,
    mean: torch.Tensor,
    options: AwqOptions = AwqOptions(),
    *,
    minimum: Minimum = "zero_point",
) -> Scaled:
    """The scale for weights `[out, in]` that share their inputs.

    moment: XᵀX of these `[in, in]`; mean: their mean |x| `[in]` (made equal over heads where the scale is folded into
    values that heads share, see `fold.shared_by_heads`). What comes out is never worse than no scale at all, on the
    rows that were looked at. The weights are then to become `W · diag(s)`, the moment `fold.into_moment`, and what
    comes before them is to be divided by s.
    """
    for weight in weights:
        check_width(weight.shape[1], scheme)
    sample = torch.cat([weight[:: max(1, -(-weight.shape[0] // options.rows))] for weight in weights])
    whole = float(((sample @ moment) * sample).sum()) or 1.0
    magnitude = torch.cat(list(weights)).abs().mean(dim=0)
    one = torch.ones_like(mean)
    before = _error(sample, scheme, moment, one, options.fit, minimum)
    best, best_alpha, least = one, 0.0, before
    for alpha, scale in _candidates(mean, magnitude, options):
        error = _error(sample, scheme, moment, scale, options.fit, minimum)
        if error < least:
            best, best_alpha, least = scale, alpha, error
    return Scaled(best, best_alpha, before / whole, least / whole)


def _candidates(mean: torch.Tensor, magnitude: torch.Tensor, options: AwqOptions) -> list[tuple[float, torch.Tensor]]:
    """α and the scale it gives."""
    alphas = [i / options.steps for i in range(1, options.steps + 1)]
    found = [(alpha, _centred(mean.pow(alpha))) for alpha in alphas]
    if options.weights:
        found += [(alpha, _centred(mean.pow(alpha) / magnitude.clamp(min=1e-8).pow(1 - alpha))) for alpha in alphas]
    return found


def _centred(scale: torch.Tensor) -> torch.Tensor:
    """The scale with its largest and smallest equally far from 1; inputs that are never there are left alone."""
    usable = torch.isfinite(scale) & (scale > 1e-4)
    if not bool(usable.any()):
        return torch.ones_like(scale)
    inside = scale[usable]
    return torch.where(usable, scale / (inside.max() * inside.min()).sqrt(), 1.0)


def _error(
    weight: torch.Tensor, scheme: QuantScheme, moment: torch.Tensor, scale: torch.Tensor, how: Fit, minimum: Minimum
) -> float:
    """‖ΔW·X‖² when `weight` is rounded after scaling."""
    scaled = weight * scale
    inner = into_moment(moment, scale) if how == "output" else None
    change = fit(scaled, scheme, how, moment=inner, minimum=minimum).nearest(scaled) / scale - weight
    return float(((change @ moment) * change).sum())
