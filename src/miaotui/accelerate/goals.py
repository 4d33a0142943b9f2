"""What is to become better, as a cost for each thing that is measured: less is better, and a gain is a ratio of costs.

| cost | what it is |
|---|---|
| answer | seconds for an answer of 128 tokens to a prompt of 512, one request at a time |
| streams | seconds for a new token when 64 requests of 64 tokens in and 32 out come at once |
| memory | most resident bytes of a fresh process that answers once |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from miaotui.measure.intervals import Estimate
from miaotui.measure.stats import summarise

Goal = Literal["latency", "throughput", "memory", "balanced"]
Cost = Literal["answer", "streams", "memory"]
Figures = Mapping[str, float]
"""Cost → its value."""

COSTS: dict[Goal, tuple[Cost, ...]] = {
    "latency": ("answer",),
    "throughput": ("streams",),
    "memory": ("memory",),
    "balanced": ("answer", "streams", "memory"),
}
PROMPT, ANSWER = 512, 128
STREAMS, STREAM_PROMPT, STREAM_ANSWER = 64, 64, 32


def gain(goal: Goal, before: Figures, after: Figures) -> float:
    """How many times as good: the geometric mean of the ratios of the goal's costs."""
    logs = [math.log(before[cost] / after[cost]) for cost in COSTS[goal]]
    return math.exp(sum(logs) / len(logs))


def gain_of_rounds(goal: Goal, before: Sequence[Figures], after: Sequence[Figures]) -> Estimate:
    """The median gain over rounds that alternated, with its bootstrap interval; no interval for a single round."""
    gains = [gain(goal, b, a) for b, a in zip(before, after, strict=True)]
    if len(gains) == 1:
        return Estimate(gains[0], None, None, None)
    figure = summarise(gains, higher_is_better=True)
    return Estimate(figure.median, float(np.std(gains, ddof=1) / math.sqrt(len(gains))), figure.low, figure.high)
