"""Which candidates cannot win any more, by what was measured of others: the reason, for the card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from miaotui.accelerate.card.wording import percent
from miaotui.accelerate.search.attempt import Attempt, Plan
from miaotui.accelerate.search.space import Candidate, Space

SLACK = 0.8
"""The ceiling model may be so wrong about one candidate against another."""
HOPELESS = 8
"""Where even the low end of the loss is so many floors, no other method brings it back."""
SAVED = {"rtn": 1.0, "hqq": 0.7, "awq": 0.4, "gptq": 0.25, "awq+gptq": 0.2}
"""What is left of the loss by plain rounding, at the best."""
COMPARABLE = 20
"""From so many times the error on, a loss tells nothing about another."""


@dataclass(frozen=True)
class Bounds:
    """`gains` is the ceiling model."""

    plan: Plan
    space: Space
    gains: Callable[[Candidate], float]

    def needless(self, candidate: Candidate, attempts: Sequence[Attempt]) -> str | None:
        """Why it cannot win any more; None while it can."""
        promised = self.gains(candidate)
        if promised < 1:
            return f"at its ceiling it would be {promised:.2f}× the original"
        for other in attempts:
            why = self._settled_by(other, candidate)
            if why is not None:
                return why
        feared = self._feared(candidate, attempts)
        if feared is not None:
            return feared
        best = fastest(attempts)
        if best is not None and best.value > 1 and promised < SLACK * best.predicted:
            return (
                f"at the ceilings it promises {promised:.2f}× where {best.name} promised {best.predicted:.2f}×"
                f" (and was measured at {best.value:.2f}×)"
            )
        return None

    def _feared(self, candidate: Candidate, attempts: Sequence[Attempt]) -> str | None:
        """Why it must lose far too much: its weights are changed so much more than those of one that was measured.

        A loss is taken to grow with the squared error of the weights, of which the best methods save `SAVED`.
        """
        mine = self.space.error(candidate)
        if mine is None or candidate.recipe is None:
            return None
        for other in attempts:
            theirs, ratio = self.space.error(other.candidate), other.ratio
            if theirs is None or ratio is None or ratio.low is None or other.candidate.recipe is None:
                continue
            if mine > COMPARABLE * theirs:
                continue
            saved = SAVED[candidate.recipe.method] / SAVED[other.candidate.recipe.method]
            loss = (ratio.low - 1) * mine / theirs * saved
            if loss > HOPELESS * max(self.plan.floor, 0.005):
                return (
                    f"rounding changes its weights {mine / theirs:.1f}× as much as those of {other.name},"
                    f" which lose {percent(ratio.value - 1)}"
                )
        return None

    def _settled_by(self, other: Attempt, candidate: Candidate) -> str | None:
        """What another method, or the same weights computed otherwise, already tells about it."""
        mine, theirs = candidate.features(), other.candidate.features()
        differing = [name for name in mine if mine[name] != theirs[name]]
        ratio = other.ratio
        if ratio is None or other.failed:
            return None
        if differing == ["blocks"] and not other.holds and _layers(other.candidate) >= _layers(candidate):
            return f"{other.name} already loses {percent(ratio.value - 1)}"
        if differing == ["method"] and other.holds:
            return f"{other.name} keeps the floor with the same numbers, and runs as fast"
        if differing == ["method"] and ratio.low is not None and ratio.low > 1 + HOPELESS * max(self.plan.floor, 0.005):
            return f"{other.name} loses {percent(ratio.value - 1)}: no method brings that back"
        if differing == ["compute"] and other.holds:
            return f"{other.name} keeps the floor with activations in int8"
        if differing == ["compute"] and ratio.value > 1 + self.plan.floor + 0.01:
            return f"{other.name} loses {percent(ratio.value - 1)}, far more than its activations can be blamed for"
        return None


def fastest(attempts: Sequence[Attempt]) -> Attempt | None:
    """Of those that may win."""
    return max((a for a in attempts if a.stands), key=lambda a: a.value, default=None)


def _layers(candidate: Candidate) -> float:
    return float("inf") if candidate.blocks is None else candidate.blocks
