"""Importance, least squares and cutting against their definitions, in float64, on the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miaotui.compress.methods import structured
from tests.compress.methods import problems

ROWS, WIDTH = 300, 48


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = problems.inputs(ROWS, WIDTH)
    return problems.weight(20, WIDTH), x, problems.moment(x)


def test_importance_is_the_energy_of_what_would_be_missing(problem: tuple[torch.Tensor, ...]) -> None:
    weight, x, moment = problem
    alone = [float((x[:, j : j + 1].double() @ weight[:, j : j + 1].double().T).square().sum()) for j in range(WIDTH)]
    np.testing.assert_allclose(structured.channel_importance(weight, moment), alone, rtol=1e-4)
    parts = [slice(g * 12, (g + 1) * 12) for g in range(4)]
    together = [float((x[:, p].double() @ weight[:, p].double().T).square().sum()) for p in parts]
    np.testing.assert_allclose(structured.group_importance(weight, moment, 4), together, rtol=1e-4)


def test_shares_and_the_most_important() -> None:
    assert structured.shares(torch.tensor([1.0, 3.0])).tolist() == [0.25, 0.75]
    assert structured.shares(torch.zeros(4)).tolist() == [0.25] * 4
    assert structured.most_important(torch.tensor([5.0, 1.0, 7.0, 2.0]), 2).tolist() == [0, 2]


def test_what_is_left_is_the_least_squares_solution(problem: tuple[torch.Tensor, ...]) -> None:
    weight, x, moment = problem
    kept = torch.tensor([i for i in range(WIDTH) if i % 3])
    found = structured.keep_columns(weight, kept, moment, damping=1e-9)
    best = np.linalg.lstsq(x[:, kept].double().numpy(), (x.double() @ weight.double().T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), best, atol=2e-4)
    np.testing.assert_array_equal(structured.keep_columns(weight, kept), weight[:, kept])
    # damping: the same problem with rows that hold each weight where it was
    damped = structured.keep_columns(weight, kept, moment, damping=0.1)
    tie = np.sqrt(0.1 * float(moment.diagonal().mean())) * np.eye(len(kept))
    left = np.concatenate([x[:, kept].double().numpy(), tie])
    right = np.concatenate([(x.double() @ weight.double().T).numpy(), tie @ weight[:, kept].double().numpy().T])
    np.testing.assert_allclose(damped.numpy(), np.linalg.lstsq(left, right, rcond=None)[0].T, atol=2e-4)


def test_a_narrower_norm_gives_the_same_on_average() -> None:
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 32)
    weight, kept = torch.linspace(0.5, 1.5, 32), torch.arange(8, 32)
    unit = x / x.square().mean(dim=1, keepdim=True).sqrt()
    narrower = structured.narrower_norm(weight, kept, unit.square().mean(dim=0))
    part = x[:, kept]
    found = part / part.square().mean(dim=1, keepdim=True).sqrt() * narrower
    meant = (unit * weight)[:, kept]
    ratio = found.square().mean().sqrt() / meant.square().mean().sqrt()
    assert float(ratio) == pytest.approx(1, abs=0.02)
    plain = part / part.square().mean(dim=1, keepdim=True).sqrt() * weight[kept]
    assert abs(float(plain.square().mean().sqrt() / meant.square().mean().sqrt()) - 1) > 0.05


def test_blocks_are_dropped_one_by_one() -> None:
    """Costs depend on what is gone: 1 is cheap until 2 has gone, and 0 cheap after it."""
    costs = {frozenset(): {0: 3.0, 1: 2.0, 2: 1.0, 3: 9.0}, frozenset({2}): {0: 1.0, 1: 5.0, 3: 9.0}}
    gone, rounds = structured.drop_greedily(2, lambda gone: costs[gone])
    assert gone == [2, 0]
    assert rounds == list(costs.values())


@pytest.mark.parametrize("fused", [False, True])
def test_rows_of_parts_that_are_one_matrix(fused: bool) -> None:
    parts = [torch.arange(rows * 2.0).view(rows, 2) + 100 * i for i, rows in enumerate((4, 2, 2))]
    biases = [part[:, 0] for part in parts]
    rows = [torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([0])]
    given = ([torch.cat(parts)], [torch.cat(biases)]) if fused else (parts, biases)
    weights, offsets = structured.take_rows(*given, rows, [4, 2, 2])
    assert len(weights) == (1 if fused else 3)
    assert torch.cat(weights)[:, 0].tolist() == [0, 6, 102, 200]
    assert offsets is not None
    assert torch.cat(offsets).tolist() == [0, 6, 102, 200]
    assert structured.spread(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
