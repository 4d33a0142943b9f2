"""Corrected weights against least squares on the inputs themselves."""

from __future__ import annotations

import pytest
import torch

from miaotui.compress.methods.correct import corrected
from miaotui.compress.methods.gptq import gptq
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems


def moved(x: torch.Tensor) -> torch.Tensor:
    """Inputs as a quantised model has them: the same, mixed a little, and noise."""
    g = torch.Generator().manual_seed(5)
    mixing = torch.eye(x.shape[1]) + 0.05 * torch.randn(x.shape[1], x.shape[1], generator=g)
    return x @ mixing + 0.1 * torch.randn(x.shape, generator=g)


@pytest.mark.parametrize("lacking", [False, True])
def test_it_is_the_damped_least_squares(lacking: bool) -> None:
    weight, x = problems.weight(12, 24), problems.inputs(200, 24)
    now = moved(x)
    lack = torch.randn(200, 12, generator=torch.Generator().manual_seed(7)) if lacking else torch.zeros(200, 12)
    ours = corrected(weight, problems.moment(now), x.T @ now, 0.02, lack=lack.T @ now if lacking else None)
    # rows of √λ·(W′ − W) beside the tokens, in float64
    ridge = (0.02 * float(problems.moment(now).diagonal().mean())) ** 0.5 * torch.eye(24).double()
    left = torch.cat([now.double(), ridge])
    right = torch.cat([x.double() @ weight.double().T + lack.double(), ridge @ weight.double().T])
    theirs = torch.linalg.lstsq(left, right).solution.T.float()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(ours, weight, atol=1e-3)


def test_the_same_inputs_change_nothing() -> None:
    weight, moment = problems.weight(12, 24), problems.moment(problems.inputs(200, 24))
    torch.testing.assert_close(corrected(weight, moment, moment, 0.01), weight, atol=1e-5, rtol=1e-5)


def test_rounding_then_comes_nearer_to_what_the_original_gave() -> None:
    weight, x, scheme = problems.weight(32, 64), problems.inputs(500, 64), QuantScheme(4, 32, True)
    now = moved(x)
    moment, want = problems.moment(now), x @ weight.T
    plain = gptq(weight, scheme, moment).values
    made = gptq(corrected(weight, moment, x.T @ now, 0.01), scheme, moment).values
    assert float((now @ made.T - want).square().sum()) < 0.8 * float((now @ plain.T - want).square().sum())


def test_inputs_that_never_occur_keep_their_weights() -> None:
    weight, x = problems.weight(6, 16), problems.inputs(50, 16)
    x[:, 3] = 0
    now = moved(x)
    now[:, 3] = 0
    made = corrected(weight, problems.moment(now), x.T @ now, 0.01)
    assert torch.equal(made[:, 3], weight[:, 3])
    assert bool(torch.isfinite(made).all())
    assert torch.equal(corrected(weight, torch.zeros(16, 16), torch.zeros(16, 16), 0.01), weight)
