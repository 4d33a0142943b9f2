"""Rounding to nearest, with ranges as they are or searched."""

from __future__ import annotations

import torch

from miaotui.compress.methods.grid import Fit, Minimum, Quantised, fit, quantised
from miaotui.quant.scheme import QuantScheme


def rtn(
    weight: torch.Tensor,
    scheme: QuantScheme,
    *,
    how: Fit = "minmax",
    moment: torch.Tensor | None = None,
    minimum: Minimum = "zero_point",
) -> Quantised:
    """The nearest codes of a weight `[out, in]` on the grid that `fit` gives.

    `moment`, XᵀX of the inputs, is what the error is measured by; `how="output"` searches with it too.
    """
    grid = fit(weight, scheme, how, moment=moment, minimum=minimum)
    return quantised(grid, grid.codes(weight), weight, moment)
