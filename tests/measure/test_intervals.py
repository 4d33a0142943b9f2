"""Standard errors, intervals and p-values against scipy, brute force, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from miaotui.measure import intervals
from miaotui.measure.intervals import Estimate


def windows(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Tokens that have something in common with their window."""
    random = np.random.default_rng(seed)
    return [3 + random.normal(0, 0.5) + random.normal(0, 2, size) for _ in range(count)]


def test_mean_of_equal_windows_is_that_of_their_means() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the other opinion is scipy's")
    groups = windows(12, 50)
    means = np.array([group.mean() for group in groups])
    found = intervals.mean(groups)
    low, high = stats.t.interval(0.95, 11, means.mean(), stats.sem(means))
    assert (found.value, found.stderr) == pytest.approx((means.mean(), stats.sem(means)))
    assert (found.low, found.high) == pytest.approx((low, high))
    test = stats.ttest_1samp(means, 0)
    assert intervals.paired_test(found, 12) == pytest.approx(test.pvalue, abs=1e-12)


def test_students_t() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the other opinion is scipy's")
    for freedom in (1, 2, 3, 4, 7, 10, 39, 100, 1023):
        assert intervals.student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
        for t in (0.0, 0.3, -1.7, 2.5, 6.0):
            assert intervals.student_tails(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-13)


def test_intervals_hold_what_they_promise() -> None:
    """Of 200 samples of 10 windows, 95% hold the truth: fewer than 186 would be one chance in several hundred."""
    held = 0
    for seed in range(200):
        found = intervals.mean(windows(10, 30, seed))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 3 <= found.high
    assert held >= 183


def test_unequal_windows_weigh_by_their_tokens() -> None:
    groups = [np.ones(10), np.full(30, 2.0)]
    assert intervals.mean(groups).value == pytest.approx(1.75)
    assert intervals.resampled_mean(groups).value == pytest.approx(1.75)


def test_one_window_counts_tokens_and_one_token_nothing() -> None:
    (group,) = windows(1, 400)
    found = intervals.mean([group])
    assert found.stderr == pytest.approx(group.std(ddof=1) / 20)
    assert intervals.clusters([group]) == 400
    for alone in (intervals.mean([group[:1]]), intervals.resampled_quantile([group[:1]], 0.99)):
        assert alone == Estimate(group[0], None, None, None)
        assert alone.exp() == Estimate(math.exp(group[0]), None, None, None)
        assert intervals.paired_test(alone, 1) is None


def test_delta_method() -> None:
    found = Estimate(2.0, 0.1, 1.8, 2.2).exp()
    assert found == Estimate(math.exp(2), math.exp(2) * 0.1, math.exp(1.8), math.exp(2.2))
    assert found.report("x") == {
        "x": found.value,
        "x_stderr": found.stderr,
        "x_interval": [found.low, found.high],
    }


def test_no_difference_and_a_certain_one() -> None:
    assert intervals.paired_test(intervals.mean([np.zeros(3)] * 4), 4) == 1.0
    assert intervals.paired_test(intervals.mean([np.ones(3)] * 4), 4) == 0.0


@pytest.mark.parametrize(("count", "size"), [(1, 700), (5, 400), (30, 1000)])
def test_quantile(count: int, size: int) -> None:
    groups = [np.exp(group) for group in windows(count, size)]
    values = np.concatenate(groups)
    found = intervals.resampled_quantile(groups, 0.99)
    assert (values > found.value).sum() == int(0.01 * len(values))
    assert found.stderr is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    random, drawn = np.random.default_rng(1), []
    for _ in range(300):
        picks = random.integers(0, count, count) if count > 1 else None
        sample = np.concatenate([groups[i] for i in picks]) if picks is not None else random.choice(values, len(values))
        drawn.append(np.quantile(sample, 0.99))
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.25)


def test_a_product_is_as_uncertain_as_both() -> None:
    """Against draws of both figures, whose logarithms are normal."""
    spreads, values = (0.03, 0.04), (3.0, 1.2)
    first, second = (
        Estimate(v, v * s, v * math.exp(-1.96 * s), v * math.exp(1.96 * s))
        for v, s in zip(values, spreads, strict=True)
    )
    random = np.random.default_rng(2)
    drawn = math.prod(v * np.exp(s * random.standard_normal(100_000)) for v, s in zip(values, spreads, strict=True))
    found = first.times(second)
    assert found.value == pytest.approx(3.6)
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.02)
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.005)
    assert first.times(Estimate(2.0, None, None, None)) == Estimate(6.0, None, None, None)
