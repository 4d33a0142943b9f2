"""The last measurements: the original and the winner side by side, regime by regime, and where a step's time goes.

Each is an action of the ledger, so that a search that is killed here goes on here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from miaotui.accelerate.goals import Goal
from miaotui.accelerate.search.duel import Side
from miaotui.accelerate.search.ledger import Ledger
from miaotui.accelerate.search.predict import Predictor
from miaotui.accelerate.search.space import ORIGINAL, Candidate
from miaotui.errors import MiaotuiError
from miaotui.hardware.ceilings import Probes
from miaotui.measure import profile, speed

LEAST_SECONDS = 10.0
"""That the regimes get, whatever the budget has left."""
LOSS = 2.0
"""How far from its ceiling a sample is, as a rule."""
ROUNDS = 5
FIRST: Mapping[Goal, tuple[str, ...]] = {
    "latency": ("decode-1@512", "prefill-512", "peak-memory", "start", "throughput-8", "load", "decode-1@16"),
    "throughput": ("throughput-64", "throughput-8", "peak-memory", "prefill-512", "decode-1@512", "load", "start"),
    "memory": ("peak-memory", "decode-1@512", "load", "prefill-512", "start", "throughput-8"),
    "balanced": ("decode-1@512", "throughput-8", "peak-memory", "prefill-512", "throughput-64", "load", "start"),
}
"""The regimes that a goal is about; the others follow."""


@dataclass(frozen=True)
class Measured:
    """Reports of `measure.speed`, the second one of the winner where there is one, and of `measure.profile`.

    `left_out`: regimes for which there was no time.
    """

    speeds: tuple[Mapping[str, Any], ...]
    profile: Mapping[str, Any] | None
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finish:
    """For one original. `seconds`: what there is for it."""

    ledger: Ledger
    predictor: Predictor
    probes: Probes
    goal: Goal
    tell: Callable[[str], None]

    def measure(self, original: str, winner: Candidate | None, artefact: str, seconds: float) -> Measured:
        """`artefact`: what to load for the winner. Both are measured as they are to be served, but guess no tokens:
        these regimes' prompts are random, and what follows them repeats as no text does."""
        sides = [Side(original, ORIGINAL.serving)]
        if winner is not None:
            sides.append(Side(artefact, replace(winner.serving, speculative=None)))
        seconds = max(LEAST_SECONDS, seconds)
        names = self.fitting(winner, 0.8 * seconds)
        settings = [side.settings() for side in sides]
        found = self.ledger.note(
            f"speed {winner.key if winner else 'original'} {','.join(names)}",
            lambda: {
                "reports": speed.run_beside(
                    settings, self.probes, names=names, repeat=ROUNDS, seconds=0.8 * seconds, tell=self.tell
                )
            },
        )
        notes: list[str] = []
        try:
            shown = self.ledger.note(
                f"profile {winner.key if winner else 'original'}",
                lambda: profile.run(settings[-1], self.probes, tell=self.tell),
            )
        except MiaotuiError as error:
            shown = None
            notes.append(f"Where a step's time goes was not measured: {error.message}")
        order = list(speed.regimes())
        reports = tuple(_in_order(report, order) for report in found["reports"])
        there = [result["regime"] for result in reports[0]["results"]]
        longest, table = self.predictor.source.spec.max_position, speed.regimes()
        too_long = [name for name in order if table[name].positions > longest]
        if too_long:
            notes.append(f"Longer than the model's context of {longest} tokens: {', '.join(too_long)}.")
        left_out = tuple(name for name in order if name not in there and name not in too_long)
        return Measured(reports, shown, left_out, tuple(notes))

    def fitting(self, winner: Candidate | None, seconds: float) -> list[str]:
        """The regimes that can be had in that time, those first that the goal is about.

        A regime costs its warm-up and one round, of both models. The goal's first regime is measured in any case, but
        none that is longer than the model's context.
        """
        longest, table = self.predictor.source.spec.max_position, speed.regimes()
        before = self.predictor.regime_seconds(ORIGINAL)
        after = before if winner is None else self.predictor.regime_seconds(winner)
        order = [*FIRST[self.goal], *(name for name in before if name not in FIRST[self.goal])]
        chosen: list[str] = []
        for name in (name for name in order if table[name].positions <= longest):
            cost = 2 * LOSS * (before[name] + (after[name] if winner is not None else 0.0))
            if cost <= seconds or not chosen:
                chosen.append(name)
                seconds -= cost
        return chosen


def _in_order(report: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    return {**report, "results": sorted(report["results"], key=lambda result: order.index(result["regime"]))}


def regimes_of(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The results of a speed report."""
    results: Sequence[Mapping[str, Any]] = report["results"]
    return results
