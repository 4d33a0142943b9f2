"""Losses against what their formulas say, computed another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from miaotui.compress.train.losses import cross_entropy, distance, divergence, divergence_of_top

ROWS, WIDTH = 5, 11


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, WIDTH, generator=generator) * 3, torch.randn(ROWS, WIDTH, generator=generator) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_that_of_scipy_times_the_square(
    pair: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> None:
    student, teacher = pair
    p, q = (softmax(x.double().numpy() / temperature, axis=1) for x in (teacher, student))
    wanted = entropy(p, q, axis=1) * temperature**2
    np.testing.assert_allclose(divergence(student, teacher, temperature).numpy(), wanted, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_of_the_top_all_others_are_one_token(pair: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
    student, teacher = pair
    p, q = (softmax(x.double().numpy() / 2, axis=1) for x in (teacher, student))
    order = np.argsort(-p, axis=1)[:, :count]
    chosen = [np.take_along_axis(x, order, 1) for x in (p, q)]
    merged = [np.concatenate([x, 1 - x.sum(1, keepdims=True)], axis=1) for x in chosen]
    found = divergence_of_top(student, teacher, count, 2.0)
    np.testing.assert_allclose(found.numpy(), entropy(*merged, axis=1) * 4, rtol=1e-3)
    assert bool((found <= divergence(student, teacher, 2.0) + 1e-6).all())


def test_of_the_top_with_all_tokens_is_the_whole(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    for count in (WIDTH - 1, WIDTH, 99):
        assert torch.equal(divergence_of_top(*pair, count, 1.5), divergence(*pair, 1.5))


def test_a_teacher_that_is_sure_leaves_finite_gradients() -> None:
    teacher = torch.zeros(1, WIDTH)
    teacher[0, 2] = 200.0
    student = torch.zeros(1, WIDTH, requires_grad=True)
    divergence_of_top(student, teacher, 3).sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
    assert float(student.grad[0, 2]) < -0.5


def test_the_gradient_of_divergence_at_a_high_temperature_is_that_of_centred_logits() -> None:
    """Hinton et al. 2015, equation 4: with zero-mean logits and high T, the gradient tends to (z − v) / N."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, WIDTH, generator=generator, dtype=torch.float64)
    student, teacher = (x - x.mean() for x in (student, teacher))
    student.requires_grad_()
    divergence(student, teacher, 1e4).sum().backward()
    np.testing.assert_allclose(student.grad.numpy(), (student - teacher).detach().numpy() / WIDTH, atol=1e-4)


def test_cross_entropy_is_the_logarithm_of_the_target(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    targets = torch.tensor([0, 3, 10, 3, 1])
    wanted = -np.log(softmax(pair[0].double().numpy(), axis=1)[np.arange(ROWS), targets.numpy()])
    np.testing.assert_allclose(cross_entropy(pair[0], targets).numpy(), wanted, rtol=1e-5)


def test_distance_is_relative_to_the_teacher() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0, 4.0]])
    projector = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert float(distance(student, teacher, projector)) == pytest.approx((4 + 4 + 1) / 25)
    assert float(distance(teacher, teacher)) == 0
    assert float(distance(teacher * 0, teacher)) == pytest.approx(1)
    assert float(distance(teacher * 7, teacher * 7 / 2)) == pytest.approx(float(distance(teacher * 2, teacher)))
