"""AWQ, SmoothQuant and folds against the formulas with the activations themselves."""

from __future__ import annotations

import pytest
import torch

from miaotui.compress.methods import fold
from miaotui.compress.methods.awq import AwqOptions, awq
from miaotui.compress.methods.gptq import gptq
from miaotui.compress.methods.rtn import rtn
from miaotui.compress.methods.smooth import smooth
from miaotui.errors import UsageError
from miaotui.quant.rounding import round_to_nearest
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems

SCHEME = QuantScheme(3, 32, True, "bfloat16")


def slow(weights: list[torch.Tensor], x: torch.Tensor, steps: int) -> tuple[float, float]:
    """α and the relative error by the paper's equation 4, with X itself and every row."""
    mean = x.abs().mean(dim=0)
    good = [x @ w.T for w in weights]
    best = (0.0, float("inf"))
    for i in range(steps + 1):
        s = mean ** (i / steps)
        s = s / (s.max() * s.min()).sqrt()
        error = sum(
            float((x / s @ torch.from_numpy(round_to_nearest((w * s).numpy(), SCHEME).dense32()).T - y).square().sum())
            for w, y in zip(weights, good, strict=True)
        )
        best = min(best, (i / steps, error), key=lambda pair: pair[1])
    return best[0], best[1] / sum(float(y.square().sum()) for y in good)


def test_the_scale_is_the_paper_s() -> None:
    weights, x = [problems.weight(24, 96, 3), problems.weight(40, 96, 4)], problems.inputs(400, 96)
    options = AwqOptions(steps=10, weights=False, rows=64, fit="minmax")
    found = awq(weights, SCHEME, problems.moment(x), x.abs().mean(dim=0), options)
    alpha, error = slow(weights, x, 10)
    assert found.alpha == alpha > 0
    assert found.after == pytest.approx(error, rel=1e-3)


def test_it_beats_rounding_and_gptq_can_follow() -> None:
    weight, x = problems.weight(48, 96), problems.inputs(400, 96)
    moment = problems.moment(x)
    found = awq([weight], SCHEME, moment, x.abs().mean(dim=0), AwqOptions(rows=48, fit="minmax"))
    assert found.after < 0.8 * found.before
    assert found.before == pytest.approx(rtn(weight, SCHEME, moment=moment).error, rel=1e-4)
    scaled, inner = fold.into_columns(weight, found.scale), fold.into_moment(moment, found.scale)
    rounded = rtn(scaled, SCHEME, moment=inner)
    assert rounded.error == pytest.approx(found.after, rel=1e-3)
    assert problems.relative_error(weight, rounded.values / found.scale, x) == pytest.approx(found.after, rel=1e-3)
    assert gptq(scaled, SCHEME, inner).error < rounded.error


def test_the_search_rounds_with_the_ranges_that_are_asked_for() -> None:
    weight, x = problems.weight(48, 96), problems.inputs(400, 96)
    moment, mean = problems.moment(x), x.abs().mean(dim=0)
    found = awq([weight], SCHEME, moment, mean, AwqOptions(rows=48))
    assert found.before == pytest.approx(rtn(weight, SCHEME, how="output", moment=moment).error, rel=1e-4)
    assert found.after < found.before
    scaled, inner = fold.into_columns(weight, found.scale), fold.into_moment(moment, found.scale)
    assert rtn(scaled, SCHEME, how="output", moment=inner).error == pytest.approx(found.after, rel=1e-3)
    plain = awq([weight], SCHEME, moment, mean, AwqOptions(rows=48, fit="minmax"))
    assert found.after < plain.after
    both = awq([weight], SCHEME, moment, mean, AwqOptions(rows=48, weights=True))
    assert both.after <= found.after


def test_inputs_that_never_occur_keep_their_scale() -> None:
    weight, x = problems.weight(16, 64), problems.inputs(200, 64)
    x[:, 7] = 0
    found = awq([weight], SCHEME, problems.moment(x), x.abs().mean(dim=0))
    assert found.scale[7] == 1
    assert bool(torch.isfinite(found.scale).all())
    nothing = awq([weight], SCHEME, torch.zeros(64, 64), torch.zeros(64))
    assert torch.equal(nothing.scale, torch.ones(64))


def test_folds_change_no_output() -> None:
    x, g = problems.inputs(50, 24), torch.rand(24) + 0.5
    scale = torch.rand(24) + 0.5
    weight, before, bias = problems.weight(8, 24), problems.weight(24, 24, 9), torch.randn(24)
    normed = x / x.square().mean(1, keepdim=True).sqrt()
    good = (normed * (g + 1)) @ weight.T
    other = (normed * (fold.into_norm(g, scale, 1.0) + 1)) @ fold.into_columns(weight, scale).T
    torch.testing.assert_close(other, good, atol=1e-4, rtol=1e-4)
    good = (x @ before.T + bias) @ weight.T
    other = (x @ fold.into_rows(before, scale).T + fold.into_rows(bias, scale)) @ fold.into_columns(weight, scale).T
    torch.testing.assert_close(other, good, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fold.into_moment(x.T @ x, scale), (x / scale).T @ (x / scale), atol=1e-2, rtol=1e-3)


def test_a_scale_shared_by_heads_folds_into_the_values() -> None:
    kv_heads, group, head_dim = 2, 3, 4
    mean = torch.rand(kv_heads * group * head_dim)
    shared = fold.shared_by_heads(mean, kv_heads, head_dim)
    scale = shared + 0.5
    values, output = torch.randn(10, kv_heads, head_dim), torch.randn(5, kv_heads * group * head_dim)
    read = values[:, :, None].expand(-1, -1, group, -1).reshape(10, -1)
    rows = fold.value_rows(scale, kv_heads, head_dim).view(kv_heads, head_dim)
    divided = (values / rows)[:, :, None].expand(-1, -1, group, -1).reshape(10, -1)
    torch.testing.assert_close(divided @ fold.into_columns(output, scale).T, read @ output.T)
    by_hand = torch.stack([mean.view(kv_heads, group, head_dim)[k, :, d].mean() for k in range(2) for d in range(4)])
    torch.testing.assert_close(fold.value_rows(shared, kv_heads, head_dim), by_hand)


def test_smoothing_is_equation_4() -> None:
    weights, x = [problems.weight(6, 40, 3), problems.weight(9, 40, 4)], problems.inputs(100, 40)
    x[:, 11] = 0
    peak = x.abs().amax(dim=0)
    scale = smooth(weights, peak, 0.7)
    for j in range(40):
        w = max(float(weight[:, j].abs().max()) for weight in weights)
        want = 1.0 if j == 11 else float(peak[j]) ** 0.7 / w**0.3
        assert float(scale[j]) == pytest.approx(want, rel=1e-5)
    with pytest.raises(UsageError, match="strength"):
        smooth(weights, peak, 1.5)
