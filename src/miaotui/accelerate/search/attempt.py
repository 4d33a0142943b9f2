"""A candidate on its way through the search: what is known of it, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from miaotui.accelerate.card.schema import Floor
from miaotui.accelerate.goals import Goal, gain_of_rounds
from miaotui.accelerate.search.sample import Tried
from miaotui.accelerate.search.space import Candidate
from miaotui.accelerate.search.trial import Built, Confirmation, Duel, Scores
from miaotui.hardware.sensors import BUSY
from miaotui.measure.intervals import Estimate


@dataclass(frozen=True)
class Plan:
    """What is asked for: `floor` 0.01 lets perplexity rise by 1%; `budget` in seconds."""

    goal: Goal
    floor: float
    budget: float
    seed: int = 0


@dataclass(eq=False)
class Attempt:
    """`predicted`: its gain at the ceilings. `rival`: what it is timed beside; None: the original. `why`: a sentence,
    once something has become of it."""

    plan: Plan
    candidate: Candidate
    predicted: float
    stage: str = "screen"
    rival: Attempt | None = None
    built: Built | None = None
    scores: Scores = field(default_factory=Scores)
    duel: Duel = field(default_factory=Duel)
    confirmation: Confirmation | None = None
    failed: bool = False
    refuted: bool = False
    """Whether text that nothing was chosen by has shown that these answers lose too much."""
    won: bool = False
    why: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def exact(self) -> bool:
        """Whether it gives the original's answers: its weights, computed in its number types."""
        return self.candidate.answers_key == Candidate(None).answers_key

    @property
    def ratio(self) -> Estimate | None:
        """Perplexity ÷ the original's, on the text that is chosen by."""
        if self.exact:
            return Estimate(1.0, 0.0, 1.0, 1.0)
        return self.scores.ratio if len(self.scores) else None

    @property
    def floor(self) -> Floor:
        """Whether it keeps the floor: all of the paired 95% interval of the ratio must.

        The interval is Student's over windows, not a bootstrap's: the first look has eight windows, of which a
        bootstrap makes intervals that are too narrow.
        """
        ratio = self.ratio
        return Floor(self.plan.floor, "undecided") if ratio is None else Floor.of(self.plan.floor, ratio)

    @property
    def lead(self) -> Estimate | None:
        """How many times as good as its rival, over rounds that alternated."""
        if not len(self.duel):
            return None
        return gain_of_rounds(self.plan.goal, self.duel.before, self.duel.after)

    @property
    def gain(self) -> Estimate | None:
        """How many times as good as the original: its lead, times its rival's gain where that is another."""
        lead, before = self.lead, None if self.rival is None else self.rival.gain
        return lead if lead is None or before is None else lead.times(before)

    @property
    def value(self) -> float:
        """The median gain; 0 for one that has none."""
        found = self.gain
        return 0.0 if found is None else found.value

    @property
    def disturbed(self) -> bool:
        """Whether other processes took part of the machine while it was measured."""
        return self.duel.others >= BUSY

    @property
    def holds(self) -> bool:
        """Whether it keeps the floor as far as is known."""
        return self.floor.holds and not self.refuted

    @property
    def stands(self) -> bool:
        """Whether it may win: it keeps the floor and was measured."""
        return not self.failed and self.holds and self.gain is not None

    def tried(self) -> Tried | None:
        """What a sampler learns from it: an attempt without a duel is only known to break the floor."""
        ratio = self.ratio
        if self.failed or ratio is None:
            return None
        high = ratio.value if ratio.high is None else ratio.high
        excess = high - 1 - self.plan.floor
        return Tried(
            self.candidate, self.value or self.predicted, max(excess, self.plan.floor) if self.refuted else excess
        )
