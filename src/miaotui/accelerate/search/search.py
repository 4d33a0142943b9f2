"""The search: propose → build → measure → keep. Cheap first, and every step once.

screen    the safest, then candidates in the order of the ceiling model, or as a sampler proposes where there are
          more than fit; the first windows of text reject the hopeless, more are read until the floor is decided, and
          those that keep it are timed
halve     those that keep the floor are timed again and again, the slower half leaving each time
tune      the best weights are served in other ways: cache, threads, speculation, bounds of a batch; each is timed
          beside the best so far
confirm   the best is measured on text that nothing was chosen by, beside the original; if it fails, the next

When that text refutes all that stood, what was left out because of them is looked at after all.

Straight-line code over a `Ledger`: what was done before a kill is told again. Two bounds save the rest of the work: a
candidate is left out when a quicker method already keeps the floor with the same numbers, when the ceiling model
promises clearly less than it promised of one that keeps the floor, and when its weights are changed so much more than
those of one that was measured that it must lose far too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from miaotui.accelerate.card.schema import Floor
from miaotui.accelerate.card.wording import loss_sentence, times
from miaotui.accelerate.goals import gain_of_rounds
from miaotui.accelerate.search.attempt import Attempt, Plan
from miaotui.accelerate.search.bounds import Bounds, fastest
from miaotui.accelerate.search.ledger import FailedError, Ledger
from miaotui.accelerate.search.sample import Pick, Tried
from miaotui.accelerate.search.space import DEFAULT, METHODS, ORIGINAL, Candidate, Serving, Space
from miaotui.accelerate.search.trial import Duel
from miaotui.hardware.sensors import BUSY

SCREEN, HALVE, TUNE, CONFIRM = 0.5, 0.6, 0.75, 0.9
"""Shares of the budget at which each stage takes up nothing new; what is left is for the last measurements."""
FIRST_LOOK = 8
"""Windows that reject the hopeless; then twice as many, and so on."""
ROUNDS, TUNING_ROUNDS, TRIES = 3, 5, 3
"""Of a first duel; of one between two ways to serve, which are apart by less; and how often it is repeated while others
disturb it."""
LEAST_GAIN = 1.02
"""Less is not worth another artefact."""
MOST_TUNED, MOST_CONFIRMED = 12, 3

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """`winner` is confirmed; None: keep the original. `skipped`: what was left out, each with the reason."""

    plan: Plan
    winner: Attempt | None
    attempts: tuple[Attempt, ...]
    skipped: tuple[tuple[Candidate, str], ...]
    spent: float
    notes: tuple[str, ...] = ()

    @property
    def closest(self) -> Attempt | None:
        """Of what did not win, the one that came nearest: the best of those that keep the floor, or the least loss."""
        known = [a for a in self.attempts if a.ratio is not None and not a.won and not a.failed]
        standing = [a for a in known if a.stands and a.value >= LEAST_GAIN]
        recipes = [a for a in known if a.candidate.recipe is not None and not a.stands]
        if standing:
            return max(standing, key=lambda a: a.value)
        return min(recipes or known, key=lambda a: a.ratio.value if a.ratio else 0.0, default=None)


def search(
    plan: Plan, space: Space, ledger: Ledger, gains: Callable[[Candidate], float], pick: Pick, tell: Tell
) -> Outcome:
    """Run it, or finish one that the ledger's journal has begun. `gains` is the ceiling model."""
    return _Search(plan, space, ledger, gains, pick, tell, Bounds(plan, space, gains)).run()


@dataclass
class _Search:
    plan: Plan
    space: Space
    ledger: Ledger
    gains: Callable[[Candidate], float]
    pick: Pick
    tell: Tell
    bounds: Bounds
    attempts: list[Attempt] = field(default_factory=list)
    skipped: list[tuple[Candidate, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Outcome:
        winner, before = self._pass(SCREEN), 0
        while winner is None and len(self.attempts) > before and any(a.refuted for a in self.attempts):
            before = len(self.attempts)
            winner = self._pass(CONFIRM)
        self._explain()
        disturbed = sum(a.disturbed for a in self.attempts)
        if disturbed:
            self.notes.append(f"Other processes disturbed {disturbed} of {len(self.attempts)} trials.")
        return Outcome(
            self.plan, winner, tuple(self.attempts), tuple(self.skipped), self.ledger.spent, tuple(self.notes)
        )

    def _pass(self, screening: float) -> Attempt | None:
        """All stages once; `screening` is the share of the budget until which new weights are looked at."""
        self._screen(screening)
        self._halve()
        best = fastest(self.attempts)
        return self._confirm(self._tune(best), best)

    def _explain(self) -> None:
        """A reason for all that stood and were not needed."""
        winner = next((a for a in self.attempts if a.won), None)
        for attempt in self.attempts:
            if not attempt.why:
                other = "" if winner is None else f", and {winner.name} {winner.value:.2f}×"
                attempt.why = f"{attempt.value:.2f}× the original{other}"

    # -- screen ------------------------------------------------------------------------------------------
    def _untried(self) -> list[Candidate]:
        return sorted(self._new(self.space.weights), key=self._promise)

    def _new(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Those that were not tried."""
        tried = {attempt.candidate.key for attempt in self.attempts}
        return [candidate for candidate in candidates if candidate.key not in tried]

    def _screen(self, share: float) -> None:
        self.skipped.clear()
        ordered = self._untried()
        while ordered := self._worthwhile(ordered):
            if self.attempts and not self._time_for_another(share):
                self._leave(ordered, "the budget was spent on those that promised more")
                return
            ready = [c for c in ordered if not self._waits(c)]
            if not ready:
                self._leave(ordered, "what it depends on was not tried")
                return
            chosen = (
                self._safest(ready) if not self.attempts else self.pick(ready, self._tried(), fits=self._fits(share))
            )
            ordered.remove(chosen)
            self._try(chosen, "screen")

    def _safest(self, candidates: Sequence[Candidate]) -> Candidate:
        """The first: of those that hardly change the weights, what promises most, so that something stands early on."""
        errors = {c.key: error for c in candidates if (error := self.space.error(c)) is not None}
        least = min(errors.values(), default=None)
        if least is None:
            return candidates[0]
        return next(c for c in candidates if errors.get(c.key, math.inf) <= 4 * least)

    def _depths(self) -> list[int]:
        return sorted({c.blocks for c in self.space.weights if c.blocks is not None})

    def _promise(self, candidate: Candidate) -> tuple[float, int]:
        """The highest predicted gain first, the quickest method first among equals."""
        recipe = candidate.recipe
        return -round(self.gains(candidate), 6), METHODS.index(recipe.method) if recipe else 0

    def _worthwhile(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        kept = []
        for candidate in candidates:
            why = self.bounds.needless(candidate, self.attempts)
            if why is None:
                kept.append(candidate)
            else:
                self.skipped.append((candidate, why))
        return kept

    def _waits(self, candidate: Candidate) -> bool:
        """Exact activations are of interest once coded ones have broken the floor; a cut once all layers keep it."""
        if candidate.blocks is not None:
            more = [replace(candidate, blocks=other) for other in self._depths() if other > candidate.blocks]
            whole = replace(candidate, blocks=None)
            return any(not any(a.candidate == one for a in self.attempts) for one in (whole, *more))
        coded = candidate.served(compute="auto")
        return candidate != coded and not any(a.candidate == coded for a in self.attempts)

    # -- halve -------------------------------------------------------------------------------------------
    def _halve(self) -> None:
        """Twice the rounds and half the candidates each time."""
        alive = sorted((a for a in self.attempts if a.stands), key=lambda a: -a.value)
        rounds, turn = ROUNDS + 1, 1
        while len(alive) > 1 and self._time(HALVE):
            kept, left = alive[: -(-len(alive) // 2)], alive[-(-len(alive) // 2) :]
            for attempt in left:
                attempt.why = (
                    attempt.why or f"{attempt.value:.2f}× the original, and {kept[0].name} {kept[0].value:.2f}×"
                )
            if len(kept) == 1 and turn > 1:
                return
            for attempt in kept:
                self._guarded(attempt, partial(self._time_it, attempt, rounds))
                attempt.stage = "halve"
            alive = sorted((a for a in kept if a.stands), key=lambda a: -a.value)
            rounds, turn = 2 * rounds, turn + 1

    # -- tune --------------------------------------------------------------------------------------------
    def _tune(self, best: Attempt | None) -> Attempt | None:
        """The best weights, or the original's when none keep the floor, served as suits this machine.

        One change at a time: what differs from the best so far in one choice comes before what differs in more.
        """
        base = ORIGINAL if best is None else best.candidate
        remaining = self._new(_ways(base, self.space.servings))
        incumbent, tuned = best, 0
        while remaining and tuned < MOST_TUNED and self._time_for_another(TUNE):
            now = base if incumbent is None else incumbent.candidate
            least = min(_distance(candidate, now) for candidate in remaining)
            near = [candidate for candidate in remaining if _distance(candidate, now) == least]
            chosen = self.pick(near, self._tried(base), fits=min(self._fits(TUNE), MOST_TUNED - tuned))
            remaining.remove(chosen)
            tuned += 1
            found = self._try(chosen, "tune", incumbent)
            if self._leads_twice(found):
                incumbent = found
            elif found.stands and found.lead is not None:
                other = "the original" if found.rival is None else found.rival.name
                found.why = f"{times(found.lead)} {other}: not told to be better"
        return incumbent

    def _leads_twice(self, found: Attempt) -> bool:
        """Whether rounds of their own say so again: of a dozen ways that are tried, one may lead by chance."""
        if not (found.stands and _leads(found, found.duel)):
            return False
        first = len(found.duel)
        self._guarded(found, partial(self._time_it, found, TUNING_ROUNDS))
        return found.stands and _leads(found, found.duel.since(first))

    # -- confirm -----------------------------------------------------------------------------------------
    def _confirm(self, tuned: Attempt | None, best: Attempt | None) -> Attempt | None:
        others = sorted((a for a in self.attempts if a.stands and a.value > 1), key=lambda a: -a.value)
        queue = list(dict.fromkeys(a for a in (tuned, best, *others) if a is not None and a.value > 1))
        confirmed = 0
        for attempt in queue:
            if attempt.confirmation is not None or attempt.refuted:
                continue
            if confirmed == MOST_CONFIRMED or (confirmed and not self._time(CONFIRM)):
                return None
            confirmed += 1
            self.tell(f"confirming {attempt.name}")
            if self._guarded(attempt, partial(self._confirm_it, attempt)) and attempt.won:
                return attempt
        return None

    def _confirm_it(self, attempt: Attempt) -> None:
        attempt.stage = "confirm"
        attempt.confirmation = found = self.ledger.confirm(attempt.candidate)
        floor = Floor.of(self.plan.floor, found.ratio)
        gain = gain_of_rounds(self.plan.goal, found.duel.before, found.duel.after)
        if not floor.holds:
            attempt.why = f"on text that nothing was chosen by it {loss_sentence(floor)}"
            for other in self.attempts:
                other.refuted |= other.candidate.answers_key == attempt.candidate.answers_key
        elif (gain.value if gain.low is None else gain.low) < LEAST_GAIN:
            attempt.why = f"it keeps the floor, but is {times(gain)} the original: not faster for certain"
        else:
            attempt.won = True
            attempt.why = f"{times(gain)} the original, and {loss_sentence(floor)}"

    # -- one candidate -----------------------------------------------------------------------------------
    def _try(self, candidate: Candidate, stage: str, rival: Attempt | None = None) -> Attempt:
        attempt = Attempt(self.plan, candidate, self.gains(candidate), stage, rival)
        self.attempts.append(attempt)
        self.tell(f"{stage} {len(self.attempts)}: {attempt.name}")
        self._guarded(attempt, partial(self._examine, attempt))
        return attempt

    def _examine(self, attempt: Attempt) -> None:
        recipe = attempt.candidate.recipe
        if recipe is not None:
            attempt.built = self.ledger.build(attempt.candidate)
        if not attempt.exact:
            for stop in looks(self.ledger.windows):
                attempt.scores += self.ledger.score(attempt.candidate, range(len(attempt.scores), stop))
                if attempt.floor.verdict != "undecided":
                    break
        if not attempt.floor.holds:
            attempt.why = f"it {loss_sentence(attempt.floor)}"
            return
        self._time_it(attempt, ROUNDS if attempt.rival is None else TUNING_ROUNDS)

    def _time_it(self, attempt: Attempt, rounds: int) -> None:
        """A duel, again while others disturb it; the least disturbed counts. One that stays is not waited for."""
        found: Duel | None = None
        rival = ORIGINAL if attempt.rival is None else attempt.rival.candidate
        for again in range(1 if any(a.disturbed for a in self.attempts) else TRIES):
            duel = self.ledger.duel(attempt.candidate, rounds, f"{len(attempt.duel)}.{again}", rival)
            if found is None or duel.others < found.others:
                found = duel
            if duel.others < BUSY:
                break
            self.tell(f"other processes took {duel.others:.1f} cores: {attempt.name} is measured again")
        assert found is not None
        attempt.duel += found

    def _guarded(self, attempt: Attempt, work: Callable[[], None]) -> bool:
        """Do it; False when that cannot be done, which the attempt then says."""
        before = self.ledger.spent
        try:
            work()
        except FailedError as error:
            attempt.failed, attempt.why = True, str(error)
        attempt.seconds += self.ledger.spent - before
        return not attempt.failed

    # -- time --------------------------------------------------------------------------------------------
    def _time(self, share: float) -> bool:
        return self.ledger.spent < share * self.plan.budget

    def _time_for_another(self, share: float) -> bool:
        return self._fits(share) > 0

    def _fits(self, share: float) -> int:
        """How many attempts like those so far there is time for."""
        if not self.attempts:
            return int(self._time(share))
        each = sum(a.seconds for a in self.attempts) / len(self.attempts)
        left = share * self.plan.budget - self.ledger.spent
        return max(0, int(left / each)) if each else len(self.space.weights) + len(self.space.servings)

    def _tried(self, base: Candidate | None = None) -> list[Tried]:
        """What a sampler may learn from; of the same weights when `base` is given."""
        mine = (a for a in self.attempts if base is None or a.candidate.weights_key == base.weights_key)
        return [tried for a in mine if (tried := a.tried()) is not None]

    def _leave(self, candidates: Sequence[Candidate], why: str) -> None:
        self.skipped += [(candidate, why) for candidate in candidates]


def looks(windows: int) -> Iterator[int]:
    """How many windows have been read at each look."""
    stop = min(FIRST_LOOK, windows)
    while stop < windows:
        yield stop
        stop *= 2
    yield windows


def _ways(base: Candidate, servings: Iterable[Serving]) -> Iterator[Candidate]:
    """The same weights in other ways; where they need exact activations, only in ways that leave those alone."""
    for serving in servings:
        if base.serving.compute == DEFAULT.compute or serving.compute == DEFAULT.compute:
            yield base.served(**serving.options())


def _leads(one: Attempt, duel: Duel) -> bool:
    """Whether all of the duel's interval says that it is better than its rival; than the original, worth another
    artefact."""
    lead, least = gain_of_rounds(one.plan.goal, duel.before, duel.after), LEAST_GAIN if one.rival is None else 1.0
    return lead.low is not None and lead.low > least


def _distance(one: Candidate, other: Candidate) -> int:
    """In how many choices two ways of serving differ."""
    mine, theirs = asdict(one.serving), asdict(other.serving)
    return sum(mine[name] != theirs[name] for name in mine)
