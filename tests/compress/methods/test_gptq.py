"""GPTQ against algorithm 1 of the paper, column by column in float64 with the inverse Hessian itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miaotui.compress.methods.gptq import GptqOptions, factor, gptq
from miaotui.compress.methods.grid import minmax
from miaotui.compress.methods.rtn import rtn
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems


def slow(weight: torch.Tensor, scheme: QuantScheme, moment: torch.Tensor, damping: float, order: bool) -> np.ndarray:
    """Optimal brain quantisation in a fixed order: after each column, the rest moves by −e·[H⁻¹]_{i,rest} / [H⁻¹]_ii,

    and row and column i leave the inverse (equations 2 and 3). Groups and scales are those of the original weight.
    """
    grid = minmax(weight, scheme)
    assert grid.zero is not None
    scale, zero = grid.scale.double().numpy(), grid.zero.double().numpy()
    w, h = weight.double().numpy().copy(), moment.double().numpy()
    width = w.shape[1]
    inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(width))
    columns = np.argsort(-np.diag(moment.numpy()), kind="stable") if order else np.arange(width)
    codes = np.zeros_like(w)
    for place, j in enumerate(columns):
        group = j // (scheme.group_size or width)
        q = np.clip(np.rint(w[:, j] / scale[:, group]) + zero[:, group], 0, 2**scheme.bits - 1)
        codes[:, j] = q
        error = (w[:, j] - (q - zero[:, group]) * scale[:, group]) / inverse[j, j]
        rest = columns[place + 1 :]
        w[:, rest] -= error[:, None] * inverse[j, rest]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes.astype(np.uint8)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [64, 320])  # within one lazy block, and over three
def test_codes_are_the_paper_s(width: int, symmetric: bool, order: bool) -> None:
    scheme = QuantScheme(4, 32, symmetric, "bfloat16")
    weight, moment = problems.weight(20, width), problems.moment(problems.inputs(2 * width, width))
    ours = gptq(weight, scheme, moment, GptqOptions(0.05, order, "minmax")).tensor.codes
    theirs = slow(weight, scheme, moment, 0.05, order)
    assert (ours == theirs).mean() > 0.995  # float32 against float64: a tie now and then goes the other way
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "scheme", [QuantScheme(b, g, s) for b in (2, 3, 4, 8) for g in (64, None) for s in (True, False)], ids=str
)
def test_better_than_rounding_and_honest_about_it(scheme: QuantScheme) -> None:
    weight, x = problems.weight(32, 192), problems.inputs(500, 192)
    moment = problems.moment(x)
    plain, made = rtn(weight, scheme, moment=moment), gptq(weight, scheme, moment)
    assert made.error < 0.9 * plain.error
    assert made.error == pytest.approx(problems.relative_error(weight, made.values, x), rel=1e-3)
    np.testing.assert_array_equal(made.values.numpy(), made.tensor.dense32())
    assert made.tensor.perm is None


def test_free_minimum() -> None:
    weight, moment = problems.weight(16, 64), problems.moment(problems.inputs(300, 64))
    scheme = QuantScheme(4, 32, False, "float16")
    made = gptq(weight, scheme, moment, minimum="free")
    assert made.tensor.scheme == scheme  # a float16 minimum, as Q4_1 has it
    assert made.error < rtn(weight, scheme, moment=moment, minimum="free").error
    np.testing.assert_allclose(made.values.numpy(), made.tensor.dense32(), rtol=0, atol=0)


def test_stacked_rows_are_solved_as_if_apart() -> None:
    scheme, moment = QuantScheme(4, 32, True), problems.moment(problems.inputs(300, 96))
    a, b = problems.weight(8, 96, 3), problems.weight(12, 96, 4)
    shared = factor(moment)
    together = gptq(torch.cat([a, b]), scheme, moment, shared=shared).tensor.codes
    assert (together[:8] == gptq(a, scheme, moment, shared=shared).tensor.codes).mean() > 0.99
    assert (together[8:] == gptq(b, scheme, moment).tensor.codes).mean() > 0.99


def test_factor_is_the_damped_inverse() -> None:
    moment = problems.moment(problems.inputs(400, 48))
    for order in (True, False):
        made = factor(moment, GptqOptions(0.02, order))
        at = made.order
        damped = moment[at][:, at] + 0.02 * moment.diagonal().mean() * torch.eye(48)
        torch.testing.assert_close(made.root @ made.root.T, damped, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(made.upper.T @ made.upper @ damped, torch.eye(48), atol=2e-3, rtol=0)
        assert torch.equal(made.root, made.root.triu())
        assert torch.equal(made.upper, made.upper.triu())
        assert made.damping == 0.02


def test_dead_inputs_become_zero_and_a_singular_moment_is_damped_more() -> None:
    x = problems.inputs(8, 64)  # rank 8 of 64
    x[:, 5] = 0
    weight, scheme = problems.weight(10, 64), QuantScheme(4, 32, True)
    made = gptq(weight, scheme, problems.moment(x))
    assert bool((made.values[:, 5] == 0).all())
    assert bool(torch.isfinite(made.values).all())
    tiny = factor(problems.moment(x) * 1e-3, GptqOptions(1e-12))
    assert tiny.damping > 1e-12


def test_what_is_not_finite_is_refused() -> None:
    moment = torch.eye(8)
    moment[3, 3] = float("nan")
    with pytest.raises(UsageError, match="not finite"):
        factor(moment)


def test_widths_that_groups_do_not_fill_are_refused() -> None:
    weight, x = problems.weight(4, 576), problems.inputs(10, 576)
    with pytest.raises(UsageError, match=r"576 wide, which groups of 128 do not divide.*groups of 96 or 144"):
        gptq(weight, QuantScheme(4, 128, True), problems.moment(x))
    for size in (64, 96, 144, 192):
        assert gptq(weight, QuantScheme(4, size, True), problems.moment(x)).tensor.scale.shape == (4, 576 // size)


def test_an_expert_that_saw_a_few_tokens_is_still_solved() -> None:
    """Fewer tokens than inputs, one of them enormous: finite, and no worse than nearest codes on what it saw."""
    weight, x, scheme = problems.weight(40, 96), problems.inputs(3, 96), QuantScheme(4, 32, True)
    x[0] *= 1000
    moment = problems.moment(x)
    for options in (GptqOptions(), GptqOptions(polish=2)):
        made = gptq(weight, scheme, moment, options)
        assert bool(torch.isfinite(made.values).all())
        assert made.error <= rtn(weight, scheme, moment=moment).error
