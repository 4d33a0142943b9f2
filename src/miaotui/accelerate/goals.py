"""What is to become better, as a cost for each thing that is measured: less is better, and a gain is a ratio of costs.

| cost | what it is |
|---|---|
| answer | seconds for an answer of 128 tokens to a prompt of 512, one request at a time |
| streams | seconds for a new token when 64 requests of 64 tokens in and 32 out come at once |
| memory | most resident bytes of a fresh process that answers once |

Where the original is so slow that a round of them would take too much of the budget, they are made shorter alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Workload:
    """Tokens in and out of an answer; how many streams, and the tokens in and out of each."""

    prompt: int = 512
    answer: int = 128
    streams: int = 64
    stream_prompt: int = 64
    stream_answer: int = 32

    @property
    def longest(self) -> int:
        """Positions of its longest sequence."""
        return max(self.prompt + self.answer, self.stream_prompt + self.stream_answer)

    def name(self, goal: Goal) -> str:
        """What is measured for a goal, as a regime's name."""
        match goal:
            case "latency":
                return f"answer-{self.prompt}+{self.answer}"
            case "throughput":
                return f"streams-{self.streams}x{self.stream_prompt}+{self.stream_answer}"
            case "memory":
                return "peak-memory"
            case "balanced":
                return "balanced"

    def smaller(self) -> Workload:
        """A quarter of it or so."""
        return Workload(
            max(64, self.prompt // 2),
            max(16, self.answer // 2),
            max(8, self.streams // 2),
            max(16, self.stream_prompt // 2),
            max(8, self.stream_answer // 2),
        )


def fitted(seconds: Callable[[Workload], float], most: float, longest: int) -> Workload:
    """The first workload from the full one down that takes at most so many seconds and positions; else the least."""
    load = Workload()
    while (seconds(load) > most or load.longest > longest) and load.smaller() != load:
        load = load.smaller()
    return load


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
