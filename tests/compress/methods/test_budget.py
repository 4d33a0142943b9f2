"""The assignment of bits against trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest

from miaotui.compress.methods.budget import assign
from miaotui.compress.recipe import parse_scheme
from miaotui.errors import UsageError

Problem = tuple[list[list[float]], list[int], list[list[float]]]


def problem(seed: int, count: int) -> Problem:
    """Errors that fall by about fourfold with each bit, as those of rounding do, and now and then do not."""
    draw = random.Random(seed)
    bits = [[3.25, 4.25, 8.25]] * count
    errors = [[draw.uniform(0.1, 9) * 4 ** -(b + draw.uniform(-0.8, 0.8)) for b in row] for row in bits]
    return errors, [draw.choice([1, 2, 3]) * 64 for _ in range(count)], bits


def total(values: list[list[float]], chosen: list[int] | tuple[int, ...]) -> float:
    return sum(row[c] for row, c in zip(values, chosen, strict=True))


def used(sizes: list[int], bits: list[list[float]], chosen: list[int] | tuple[int, ...]) -> float:
    return sum(s * row[c] for s, row, c in zip(sizes, bits, chosen, strict=True)) / sum(sizes)


def slow(errors: list[list[float]], sizes: list[int], bits: list[list[float]], budget: float) -> float:
    ways = itertools.product(*(range(len(row)) for row in errors))
    return min(total(errors, w) for w in ways if used(sizes, bits, w) <= budget + 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_within_the_budget_and_within_one_step_of_the_best(seed: int) -> None:
    errors, sizes, bits = problem(seed, 7)
    worst_step = max(max(row) - min(row) for row in errors)
    exact = 0
    for budget in (3.25, 3.6, 4.25, 5.0, 6.5, 8.25):
        chosen = assign(errors, sizes, bits, budget)
        assert used(sizes, bits, chosen) <= budget + 1e-6
        best = slow(errors, sizes, bits, budget)
        assert best - 1e-12 <= total(errors, chosen) <= best + worst_step
        exact += total(errors, chosen) <= best * 1.001
    assert exact >= 3


def test_nearly_optimal_for_as_many_linears_as_a_model_has() -> None:
    errors, sizes, bits = problem(99, 200)
    chosen = assign(errors, sizes, bits, 4.5)
    got, at = total(errors, chosen), 1e30
    for exponent in range(-120, 0):  # the Lagrangian bound, from below
        price = 10 ** (exponent / 12)
        each = [
            min(e + price * s * b for e, b in zip(r, bs, strict=True))
            for r, s, bs in zip(errors, sizes, bits, strict=True)
        ]
        bound = sum(each) - price * 4.5 * sum(sizes)
        at = min(at, got - bound)
    assert 0 <= at < 0.01 * got
    assert 4.49 < used(sizes, bits, chosen) <= 4.5 + 1e-6


def test_sensitive_linears_get_the_bits() -> None:
    errors = [[4.0, 1.0, 0.01], [0.4, 0.1, 0.001], [40.0, 10.0, 0.1]]
    bits = [[3.25, 4.25, 8.25]] * 3
    assert assign(errors, [64, 64, 64], bits, 5.3) == [1, 0, 2]
    assert assign(errors, [64, 64, 64], bits, 100) == [2, 2, 2]
    assert assign(errors, [64, 64, 64], bits, 3.25) == [0, 0, 0]


def test_more_bits_that_do_not_help_are_not_taken() -> None:
    assert assign([[1.0, 1.0, 2.0]], [8], [[3.0, 4.0, 8.0]], 8.0) == [0]
    assert assign([[0.0, 0.0]], [8], [[4.0, 3.0]], 8.0) == [1]


def test_schemes_of_a_recipe() -> None:
    choices = [parse_scheme(name) for name in ("w3g64-sym", "w4g64-sym", "w8g64-sym")]
    bits = [[scheme.bits(width) for scheme in choices] for width in (576, 1536)]
    assert assign([[9.0, 1.0, 0.1], [9.0, 2.0, 0.1]], [576, 1536], bits, 4.25) == [1, 1]


def test_what_cannot_be_met_is_refused() -> None:
    errors, sizes, bits = problem(0, 3)
    with pytest.raises(UsageError, match=r"take 3\.250 bits a weight, more than the budget of 3") as caught:
        assign(errors, sizes, bits, 3)
    assert "3.25 bits" in caught.value.hint
    errors[1][2] = float("nan")
    with pytest.raises(UsageError, match="not finite"):
        assign(errors, sizes, bits, 5)
