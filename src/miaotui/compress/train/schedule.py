"""The learning rate over a training: warm-up, then a cosine, or halving on plateaus; and when to stop early."""

from __future__ import annotations

import math
from dataclasses import dataclass

from miaotui.compress.train.settings import Settings

FLOOR = 0.1
"""Share of the rate that a cosine ends at (Hoffmann et al. 2022, arXiv 2203.15556)."""
PLATEAU, HALVED = 3, 0.5
"""After so many evaluations without a better one, the rate is so much of what it was."""
BETTER = 1e-4
"""Share of the best loss by which another must be lower to count as better."""


@dataclass
class Pace:
    """What the rate depends on beside the step. best: the least held-out loss, at `best_step`; since: evaluations
    after it; waited: those after the last halving, or after the best. scale: by halvings and rollbacks."""

    scale: float = 1.0
    best: float = math.inf
    best_step: int = -1
    since: int = 0
    waited: int = 0

    def rate(self, step: int, settings: Settings) -> float:
        """Of the step with this number, counted from 0."""
        if step < settings.warmup:
            return settings.rate * self.scale * (step + 1) / settings.warmup
        if settings.schedule == "plateau":
            return settings.rate * self.scale
        over = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        return settings.rate * self.scale * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * over)) / 2)

    def judge(self, loss: float, step: int, settings: Settings) -> bool:
        """Take a held-out loss in; whether it is the best so far."""
        if loss < self.best * (1 - BETTER):
            self.best, self.best_step, self.since, self.waited = loss, step, 0, 0
            return True
        self.since += 1
        self.waited += 1
        if settings.schedule == "plateau" and self.waited >= PLATEAU:
            self.scale *= HALVED
            self.waited = 0
        return False

    def tired(self, settings: Settings) -> bool:
        """Whether to stop early."""
        return settings.patience is not None and self.since >= settings.patience
