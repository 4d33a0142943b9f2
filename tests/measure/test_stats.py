from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from miaotui.measure.stats import summarise


def test_against_scipys_bootstrap() -> None:
    samples = np.random.default_rng(3).lognormal(3.0, 0.2, size=40)
    ours = summarise(samples.tolist(), higher_is_better=True)
    theirs = scipy_stats.bootstrap((samples,), np.median, method="percentile", random_state=1).confidence_interval
    assert ours.median == np.median(samples)
    assert ours.low == pytest.approx(theirs.low, rel=0.02)
    assert ours.high == pytest.approx(theirs.high, rel=0.02)


def test_p99_is_the_bad_end() -> None:
    samples = [float(value) for value in range(1, 101)]
    assert summarise(samples, higher_is_better=True).p99 < 3
    assert summarise(samples, higher_is_better=False).p99 > 98


def test_one_sample_and_none() -> None:
    figure = summarise([4.0], higher_is_better=False)
    assert (figure.median, figure.low, figure.high, figure.p99) == (4.0, 4.0, 4.0, 4.0)
    with pytest.raises(ValueError, match="no samples"):
        summarise([], higher_is_better=True)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        figure = summarise(random.normal(10.0, 1.0, size=25).tolist(), higher_is_better=True)
        covered += figure.low <= 10.0 <= figure.high
    assert 180 <= covered <= 200
