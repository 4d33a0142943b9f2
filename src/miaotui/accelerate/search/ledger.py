"""Actions of the search, each done once: what the journal has is told again, what it lacks is done and written down.

So the search is straight-line code that can be killed anywhere. Its decisions depend on nothing but the results here,
and on the seconds that the journal holds, not on a clock: run again, it takes the same path to where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from miaotui.accelerate.search.journal import Entry, Journal
from miaotui.accelerate.search.space import ORIGINAL, Candidate
from miaotui.accelerate.search.trial import (
    Built,
    Confirmation,
    Duel,
    Scores,
    Workshop,
    built_of,
    confirmation_of,
    duel_of,
    scores_of,
)
from miaotui.errors import DependencyError, InterruptedWorkError, MiaotuiError

T = TypeVar("T")


class FailedError(Exception):
    """A candidate that could not be made or measured; the message is the sentence that says why."""


class Ledger:
    """`spent` counts the seconds of every action asked for so far, whenever it was done."""

    def __init__(self, journal: Journal, workshop: Workshop, clock: Callable[[], float] = time.perf_counter) -> None:
        self._journal, self._workshop, self._clock = journal, workshop, clock
        self.spent = 0.0
        self._told: set[str] = set()
        self.windows = workshop.windows

    def build(self, candidate: Candidate) -> Built:
        return self._once(f"build {candidate.weights_key}", lambda: asdict(self._workshop.build(candidate)), built_of)

    def score(self, candidate: Candidate, windows: range) -> Scores:
        action = f"score {candidate.answers_key} {windows.start}-{windows.stop}"
        return self._once(action, lambda: asdict(self._workshop.score(candidate, windows)), scores_of)

    def duel(self, candidate: Candidate, rounds: int, turn: str, rival: Candidate = ORIGINAL) -> Duel:
        """`turn` tells duels of the same two apart."""
        action = f"duel {candidate.key} against {rival.key} {turn}"
        return self._once(action, lambda: asdict(self._workshop.duel(candidate, rounds, rival)), duel_of)

    def confirm(self, candidate: Candidate) -> Confirmation:
        action = f"confirm {candidate.key}"
        return self._once(action, lambda: asdict(self._workshop.confirm(candidate)), confirmation_of)

    def note(self, action: str, perform: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Anything else that is measured, as plain values; done once like the rest.

        What fails is not written down, and may be tried again. Raises what `perform` does.
        """
        if action in self._journal.entries:
            return self._once(action, perform, lambda found: found)
        started = self._clock()
        result = perform()
        self._journal.add(action, Entry(self._clock() - started, result))
        return self._once(action, perform, lambda found: found)

    def _once(self, action: str, perform: Callable[[], Mapping[str, Any]], parse: Callable[[Any], T]) -> T:
        """Raises FailedError for a candidate that cannot be had; what would stop every candidate goes through."""
        entry = self._journal.entries.get(action)
        if entry is None:
            entry = self._journal.add(action, self._perform(perform))
        if action not in self._told:
            self._told.add(action)
            self.spent += entry.seconds
        if entry.error is not None:
            raise FailedError(entry.error[0])
        return parse(entry.result)

    def _perform(self, perform: Callable[[], Mapping[str, Any]]) -> Entry:
        started = self._clock()
        try:
            result = perform()
        except (DependencyError, InterruptedWorkError):
            raise
        except MiaotuiError as error:
            return Entry(self._clock() - started, None, (error.message, error.hint))
        return Entry(self._clock() - started, result)


def once(journal: Journal, action: str, perform: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the journal has of an action that comes before a ledger can be; done and written down where it has none."""
    entry = journal.entries.get(action)
    if entry is None:
        started = time.perf_counter()
        result = perform()
        entry = journal.add(action, Entry(time.perf_counter() - started, result))
    assert entry.result is not None
    return entry.result
