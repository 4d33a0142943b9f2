"""Figures over tokens that come in windows: tokens of one window are alike, so windows are what is counted on.

`groups` are arrays of per-token values, one for each window. A single window leaves only its tokens to count on: the
interval is then of that text alone, and too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miaotui.measure.stats import RESAMPLES

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error, and its 95% interval; the last three are None for a single value."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None

    def exp(self) -> Estimate:
        """Of e to this: the standard error by the delta method, the interval's ends carried over."""
        value = math.exp(self.value)
        if self.stderr is None or self.low is None or self.high is None:
            return Estimate(value, None, None, None)
        return Estimate(value, value * self.stderr, math.exp(self.low), math.exp(self.high))

    def times(self, other: Estimate) -> Estimate:
        """The product of two positive figures that do not depend on one another: relative errors add in squares.

        An end of the interval is as far from the product, in logarithms, as both ends together.
        """
        value = self.value * other.value
        if self.stderr is None or self.low is None or self.high is None:
            return Estimate(value, None, None, None)
        if other.stderr is None or other.low is None or other.high is None:
            return Estimate(value, None, None, None)
        stderr = value * math.hypot(self.stderr / self.value, other.stderr / other.value)
        down = math.hypot(math.log(self.value / self.low), math.log(other.value / other.low))
        up = math.hypot(math.log(self.high / self.value), math.log(other.high / other.value))
        return Estimate(value, stderr, value * math.exp(-down), value * math.exp(up))

    def report(self, name: str) -> dict[str, float | list[float] | None]:
        """For JSON: `name`, `name_stderr` and `name_interval`."""
        interval = None if self.low is None or self.high is None else [self.low, self.high]
        return {name: self.value, f"{name}_stderr": self.stderr, f"{name}_interval": interval}


def mean(groups: Sequence[Values]) -> Estimate:
    """The mean over tokens, windows being clusters (Cochran 1977, §9A, the ratio to size); Student's t interval."""
    return mean_of_sums(*_totals(groups))


def mean_of_sums(sums: Values, sizes: Values) -> Estimate:
    """`mean` where only each window's sum and number of tokens are known."""
    value = float(sums.sum() / sizes.sum())
    count = len(sums)
    if count < 2:
        return Estimate(value, None, None, None)
    rest = sums - value * sizes
    stderr = math.sqrt(count / (count - 1) * float(rest @ rest)) / float(sizes.sum())
    reach = student_quantile(count - 1) * stderr
    return Estimate(value, stderr, value - reach, value + reach)


def resampled_mean(groups: Sequence[Values]) -> Estimate:
    """As `mean`, with a percentile-bootstrap interval: for values that are never negative and mostly small."""
    sums, sizes = _totals(groups)
    drawn = [float(counts @ sums) / float(counts @ sizes) for counts in _resamples(len(sums))]
    plain = mean(groups)
    return _with_interval(plain.value, plain.stderr, drawn)


def resampled_quantile(groups: Sequence[Values], share: float) -> Estimate:
    """The value that `share` (near 1) of all tokens do not exceed; standard error and interval by bootstrap.

    Only the largest values can be it: 5 times as many as exceed it are looked at, and 20 000 at the least.
    """
    groups = _clusters(groups)
    values = np.concatenate(groups)
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    kept = min(len(values), max(20_000, int(5 * (1 - share) * len(values))))
    order = np.argsort(values)[::-1][:kept]
    largest, owners = values[order], owner[order]

    def quantile(counts: Values) -> float:
        above = np.cumsum(counts[owners])
        at = int(np.searchsorted(above, (1 - share) * float(counts @ sizes), side="right"))
        return float(largest[min(at, kept - 1)])

    drawn = [quantile(counts) for counts in _resamples(len(groups))]
    return _with_interval(quantile(np.ones(len(groups))), float(np.std(drawn, ddof=1)) if drawn else None, drawn)


def paired_test(difference: Estimate, count: int) -> float | None:
    """The two-sided p-value of Student's t for a mean difference over `count` windows; None for one value."""
    if difference.stderr is None:
        return None
    if difference.stderr == 0.0:
        return 1.0 if difference.value == 0.0 else 0.0
    return student_tails(difference.value / difference.stderr, count - 1)


def clusters(groups: Sequence[Values]) -> int:
    """How many independent values `mean` counts on."""
    return len(_clusters(groups))


def _clusters(groups: Sequence[Values]) -> Sequence[Values]:
    return groups if len(groups) > 1 else [value for group in groups for value in group[:, None]]


def _totals(groups: Sequence[Values]) -> tuple[Values, Values]:
    """Sums and sizes of the clusters."""
    if len(groups) == 1:
        return groups[0], np.ones(len(groups[0]))
    return np.array([group.sum() for group in groups]), np.array([len(group) for group in groups], dtype=np.float64)


def _resamples(count: int) -> Iterator[Values]:
    """How often each cluster is drawn, for each bootstrap sample; none for one cluster. Seeded."""
    random = np.random.default_rng(0)
    for _ in range(RESAMPLES if count > 1 else 0):
        yield random.multinomial(count, np.full(count, 1 / count)).astype(np.float64)


def _with_interval(value: float, stderr: float | None, drawn: Sequence[float]) -> Estimate:
    if not drawn:
        return Estimate(value, None, None, None)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, stderr, float(low), float(high))


# -- Student's t -----------------------------------------------------------------------------------------
def student_tails(t: float, freedom: int) -> float:
    """P(|T| > |t|) with `freedom` degrees of freedom: the finite series of Abramowitz and Stegun 26.7.3–4."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term = total = 1.0
    for k in range(1 + freedom % 2, freedom - 2, 2):
        term *= square * k / (k + 1)
        total += term
    if freedom % 2 == 0:
        return max(0.0, 1.0 - sine * total)
    series = sine * math.cos(angle) * total if freedom > 1 else 0.0
    return max(0.0, 1.0 - 2 / math.pi * (angle + series))


def student_quantile(freedom: int, tails: float = 0.05) -> float:
    """The t that |T| exceeds with probability `tails`, by bisection."""
    low, high = 0.0, 1.0
    while student_tails(high, freedom) > tails:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tails(middle, freedom) > tails else (low, middle)
    return (low + high) / 2
