"""How far a long piece of work is, for whoever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["preflight", "calibrate", "sensitivity", "solve", "teach", "train", "write", "verify"]


@dataclass(frozen=True)
class Progress:
    """`done` of `total` layers of a stage. error: of the layer that was solved. left: seconds, once that can be said.
    note: a sentence for people.
    """

    stage: Stage
    done: int
    total: int
    error: float | None = None
    left: float | None = None
    note: str | None = None


Tell = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Tells nobody."""


@dataclass
class Clock:
    """Tells a stage's layers one by one, with the time that is left at the pace so far."""

    tell: Tell
    stage: Stage
    total: int
    done: int = 0
    _worked: int = 0
    _started: float = field(default_factory=time.perf_counter)

    def kept(self, count: int) -> None:
        """So many were there already."""
        self.done += count
        self.tell(Progress(self.stage, self.done, self.total))

    def step(self, error: float | None = None) -> None:
        self.done += 1
        self._worked += 1
        pace = (time.perf_counter() - self._started) / self._worked
        self.tell(Progress(self.stage, self.done, self.total, error, pace * (self.total - self.done)))
