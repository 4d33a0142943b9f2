"""From samples to a figure with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A median, its 95% interval, and the value that 99% of the samples are no worse than."""

    median: float
    low: float
    high: float
    p99: float


def summarise(samples: Sequence[float], *, higher_is_better: bool) -> Figure:
    """The median with a percentile-bootstrap 95% interval (Efron and Tibshirani 1993, ch. 13).

    Samples are taken as independent. The resampling is seeded, so the same samples give the same interval.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    values = np.asarray(samples, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    p99 = np.quantile(values, 0.01 if higher_is_better else 0.99)
    return Figure(float(np.median(values)), float(low), float(high), float(p99))
