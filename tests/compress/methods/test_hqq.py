"""HQQ against the authors' turns written as loops, and against what it is for: weights with outliers, without data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miaotui.compress.methods.hqq import HqqOptions, hqq, shrink
from miaotui.compress.methods.rtn import rtn
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems

ASYMMETRIC = QuantScheme(3, 32, False, "float32")


def outliers(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 128, generator=g) * 0.05
    weight[torch.rand(24, 128, generator=g) < 0.01] *= 6
    return weight


def slow(weight: np.ndarray, options: HqqOptions) -> tuple[np.ndarray, np.ndarray, float]:
    """The authors' `optimize_weights_proximal_legacy` in float64: zero point by zero point, group by group.

    Returns codes and zero points of the best turn before rounding, and the mean |error| of that turn.
    """
    groups = weight.reshape(-1, 32).astype(np.float64)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    scale = ((high - low) / 7).astype(np.float32).astype(np.float64)
    zero = np.clip(np.rint(-low / scale), 0, 7)
    beta, least, best = options.beta, np.inf, zero
    for _ in range(options.turns):
        codes = np.clip(np.rint(groups / scale[:, None] + zero[:, None]), 0, 7)
        change = groups - (codes - zero[:, None]) * scale[:, None]
        error = np.abs(change).mean()
        if error >= least:
            break
        least, best = error, zero
        size = np.maximum(np.abs(change), 1e-12)
        thrown = np.sign(change) * np.maximum(0, np.abs(change) - size ** (options.p - 1) / beta)
        zero = (codes - (groups - thrown) / scale[:, None]).mean(1)
        beta *= options.growth
    return best, scale, float(least)


def test_zero_points_are_the_authors() -> None:
    weight = outliers()
    made = hqq(weight, ASYMMETRIC)
    zero, scale, _ = slow(weight.numpy(), HqqOptions())
    np.testing.assert_allclose(made.tensor.scale.ravel(), scale, rtol=1e-6)
    assert made.tensor.minimum is not None
    ours = -made.tensor.minimum.ravel() / scale
    np.testing.assert_allclose(ours, np.clip(np.rint(zero), 0, 7), atol=1e-4)
    free = hqq(weight, ASYMMETRIC, minimum="free")
    assert free.tensor.minimum is not None
    assert not np.allclose(np.rint(-free.tensor.minimum / free.tensor.scale), -free.tensor.minimum / free.tensor.scale)


def test_shrink_is_the_generalised_threshold() -> None:
    x = torch.tensor([-2.0, -0.01, 0.0, 0.01, 2.0])
    for p in (0.5, 0.7, 1.0):
        want = [np.sign(v) * max(0.0, abs(v) - (abs(v) ** (p - 1) if v else np.inf) / 10) for v in x.tolist()]
        torch.testing.assert_close(shrink(x, 10, p), torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("minimum", ["zero_point", "free"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mean_error_is_no_worse_than_rounding(bits: int, minimum: str, symmetric: bool) -> None:
    scheme = replace(ASYMMETRIC, bits=bits, symmetric=symmetric)
    weight = outliers(1)
    plain, made = rtn(weight, scheme, minimum=minimum), hqq(weight, scheme, minimum=minimum)
    assert float((made.values - weight).abs().mean()) < 1.02 * float((plain.values - weight).abs().mean())
    np.testing.assert_allclose(made.values.numpy(), made.tensor.dense32(), rtol=0, atol=1e-7)
    if symmetric or minimum == "free":
        assert float((made.values - weight).abs().mean()) < 0.99 * float((plain.values - weight).abs().mean())


def test_the_moment_only_measures() -> None:
    weight, x = problems.weight(8, 64), problems.inputs(200, 64)
    blind, seen = hqq(weight, ASYMMETRIC), hqq(weight, ASYMMETRIC, moment=problems.moment(x))
    np.testing.assert_array_equal(blind.tensor.codes, seen.tensor.codes)
    assert seen.error == pytest.approx(problems.relative_error(weight, seen.values, x), rel=1e-3)


def test_groups_of_zeros_stay_zero_and_widths_are_checked() -> None:
    weight = outliers()
    weight[3, 32:64] = 0
    for scheme in (ASYMMETRIC, replace(ASYMMETRIC, symmetric=True)):
        made = hqq(weight, scheme)
        assert bool((made.values[3, 32:64] == 0).all())
        assert bool(torch.isfinite(made.values).all())
    with pytest.raises(UsageError, match="groups of 96 or 144"):
        hqq(torch.zeros(2, 576), QuantScheme(4, 128, True))
    with pytest.raises(UsageError, match="HQQ cannot use"):
        HqqOptions(p=0)
