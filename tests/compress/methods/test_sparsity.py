"""Magnitude, Wanda and SparseGPT against slow versions, and what a sparse weight must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miaotui.compress.methods.magnitude import magnitude
from miaotui.compress.methods.sparsegpt import SparseGptOptions, shared_factor, sparsegpt
from miaotui.compress.methods.sparsity import Sparsity, parse_share
from miaotui.compress.methods.wanda import wanda
from miaotui.errors import UsageError
from tests.compress.methods import problems

ALL = [Sparsity.parse(text) for text in ("50%", "0.7", "2:4", "4:8", "1:4")]


def slow_sparsegpt(weight: torch.Tensor, sparsity: Sparsity, moment: torch.Tensor, block: int) -> np.ndarray:
    """Optimal brain surgeon in a fixed order, in float64, with the inverse of every trailing submatrix itself."""
    w, h = weight.double().numpy().copy(), moment.double().numpy()
    width = w.shape[1]
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(width)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(width)]
    step = sparsity.of or block
    for start in range(0, width, step):
        columns = range(start, min(start + step, width))
        cost = np.stack([w[:, j] ** 2 / inverses[j][0, 0] for j in columns], axis=1)
        gone = np.zeros(cost.shape, bool)
        if sparsity.of:
            assert sparsity.keep is not None
            for row, costs in enumerate(cost):
                gone[row, np.argsort(costs)[: sparsity.of - sparsity.keep]] = True
        else:
            gone.flat[np.argsort(cost, axis=None)[: int(cost.size * sparsity.share)]] = True
        for place, j in enumerate(columns):
            error = np.where(gone[:, place], w[:, j], 0) / inverses[j][0, 0]
            w[:, j:] -= error[:, None] * inverses[j][0]
            w[gone[:, place], j] = 0
    return w


@pytest.mark.parametrize("sparsity", ALL, ids=str)
@pytest.mark.parametrize("width", [64, 200])
def test_sparsegpt_is_the_paper_s(width: int, sparsity: Sparsity) -> None:
    weight, moment = problems.weight(24, width), problems.moment(problems.inputs(3 * width, width))
    ours = sparsegpt(weight, sparsity, shared_factor(moment), SparseGptOptions(block=64)).numpy()
    theirs = slow_sparsegpt(weight, sparsity, moment, 64)
    assert ((ours == 0) == (theirs == 0)).mean() > 0.998  # float32 against float64: a tie now and then
    same = ((ours == 0) == (theirs == 0)).all(axis=1)
    assert same.mean() > 0.8
    np.testing.assert_allclose(ours[same], theirs[same], atol=2e-4)


@pytest.mark.parametrize("sparsity", ALL, ids=str)
def test_wanda_is_the_paper_s(sparsity: Sparsity) -> None:
    weight, x = problems.weight(20, 64), problems.inputs(90, 64)
    found = wanda(weight, sparsity, problems.moment(x)).numpy()
    scores = np.abs(weight.numpy()) * np.sqrt((x.double().numpy() ** 2).sum(axis=0))
    size = sparsity.of or 64
    for row in range(20):
        for start in range(0, 64, size):
            part = slice(start, start + size)
            count = size - sparsity.keep if sparsity.keep else int(size * sparsity.share)
            gone = np.argsort(scores[row, part])[:count]
            wanted = weight.numpy()[row, part].copy()
            wanted[gone] = 0
            np.testing.assert_array_equal(found[row, part], wanted)


def test_magnitude_compares_over_the_matrix() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.1, 0.2, -0.3, 5.0]])
    assert magnitude(weight, Sparsity(0.5)).tolist() == [[0, -2, 3, -4], [0, 0, 0, 5]]
    assert magnitude(weight, Sparsity.parse("2:4")).tolist() == [[0, 0, 3, -4], [0, 0, pytest.approx(-0.3), 5]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ALL), st.sampled_from(["magnitude", "wanda", "sparsegpt"]))
def test_as_sparse_as_asked(seed: int, sparsity: Sparsity, method: str) -> None:
    weight, moment = problems.weight(16, 32, seed), problems.moment(problems.inputs(40, 32, seed))
    made = {
        "magnitude": lambda: magnitude(weight, sparsity),
        "wanda": lambda: wanda(weight, sparsity, moment),
        "sparsegpt": lambda: sparsegpt(weight, sparsity, shared_factor(moment)),
    }[method]()
    zeros = made == 0
    if sparsity.of is not None and sparsity.keep is not None:
        counts = zeros.reshape(16, -1, sparsity.of).sum(dim=2)
        assert bool((counts == sparsity.of - sparsity.keep).all())
    else:
        assert float(zeros.float().mean()) == pytest.approx(sparsity.share, abs=1 / 32)
    if method != "sparsegpt":
        assert bool((made[~zeros] == weight[~zeros]).all())


@pytest.mark.parametrize("sparsity", ALL, ids=str)
def test_each_method_keeps_more_of_the_outputs_than_the_one_before(sparsity: Sparsity) -> None:
    weight, x = problems.weight(48, 128), problems.inputs(400, 128)
    moment = problems.moment(x)
    plain = problems.relative_error(weight, magnitude(weight, sparsity), x)
    aware = problems.relative_error(weight, wanda(weight, sparsity, moment), x)
    solved = problems.relative_error(weight, sparsegpt(weight, sparsity, shared_factor(moment)), x)
    assert solved < 0.95 * aware
    assert aware < plain


def test_dead_inputs_lose_their_weights() -> None:
    x = problems.inputs(100, 32)
    x[:, 5] = 0
    made = sparsegpt(problems.weight(8, 32), Sparsity(0.25), shared_factor(problems.moment(x)))
    assert bool((made[:, 5] == 0).all())
    assert bool(torch.isfinite(made).all())


@pytest.mark.parametrize("text", ["", "x", "0", "100%", "1", "4:2", "0:4", "4:4", "2:400", "-5%", "nan"])
def test_sparsities_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        Sparsity.parse(text)


def test_rows_that_a_pattern_does_not_fit() -> None:
    with pytest.raises(UsageError, match="Rows of 30 weights"):
        magnitude(torch.randn(4, 30), Sparsity.parse("2:4"))


def test_shares() -> None:
    assert parse_share("50%", "It") == parse_share(".5", "It") == 0.5
    assert str(Sparsity.parse("62.5%")) == "0.625"
    assert str(Sparsity.parse("2:4")) == "2:4"
