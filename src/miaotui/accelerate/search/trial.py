"""What was found out about a candidate, as the journal keeps it: plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from miaotui.accelerate.goals import Figures
from miaotui.accelerate.search.space import ORIGINAL, Candidate
from miaotui.measure import intervals
from miaotui.measure.intervals import Estimate


@dataclass(frozen=True)
class Built:
    """Weights that were written: bytes on disk, and what is to be said about them."""

    bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """For each window: its tokens, the sum of the differences of -log p to the original's, and of KL.

    `kl` covers the first windows only, those whose logits of the original are kept.
    """

    tokens: tuple[int, ...] = ()
    nll: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.tokens + other.tokens, self.nll + other.nll, self.kl + other.kl)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ratio(self) -> Estimate:
        """Perplexity ÷ the original's, paired over windows."""
        return intervals.mean_of_sums(np.array(self.nll), np.array(self.tokens, np.float64)).exp()

    @property
    def divergence(self) -> Estimate | None:
        """Mean KL(original ‖ candidate) in nats."""
        if not self.kl:
            return None
        return intervals.mean_of_sums(np.array(self.kl), np.array(self.tokens[: len(self.kl)], np.float64))


@dataclass(frozen=True)
class Duel:
    """Rounds of a rival and a candidate, measured in turn. `others`: cores that others took meanwhile."""

    before: tuple[Figures, ...] = ()
    after: tuple[Figures, ...] = ()
    others: float = 0.0

    def __add__(self, other: Duel) -> Duel:
        return Duel(self.before + other.before, self.after + other.after, max(self.others, other.others))

    def __len__(self) -> int:
        return len(self.before)

    def since(self, first: int) -> Duel:
        """Without its first rounds."""
        return Duel(self.before[first:], self.after[first:], self.others)


@dataclass(frozen=True)
class Confirmation:
    """The last word, on text that nothing was chosen by: a report of `measure.quality.evaluate`, and a long duel."""

    quality: Mapping[str, Any]
    duel: Duel
    notes: tuple[str, ...] = field(default=())

    @property
    def ratio(self) -> Estimate:
        report = self.quality
        low, high = report["perplexity_ratio_interval"] or (None, None)
        return Estimate(report["perplexity_ratio"], report["perplexity_ratio_stderr"], low, high)


class Workshop(Protocol):
    """Where candidates are made and measured. Any method may raise MiaotuiError for one that cannot be had."""

    windows: int
    """Windows of text there are to choose by."""

    def build(self, candidate: Candidate) -> Built:
        """Write the weights, unless they are there from an earlier run."""
        ...

    def score(self, candidate: Candidate, windows: range) -> Scores:
        """Run these windows through the written artefact, beside the original."""
        ...

    def duel(self, candidate: Candidate, rounds: int, rival: Candidate = ORIGINAL) -> Duel:
        """Measure the rival and the candidate in turn."""
        ...

    def confirm(self, candidate: Candidate) -> Confirmation:
        """Measure in full, on text of its own."""
        ...


def duel_of(values: Mapping[str, Any]) -> Duel:
    return Duel(tuple(values["before"]), tuple(values["after"]), values["others"])


def scores_of(values: Mapping[str, Sequence[Any]]) -> Scores:
    return Scores(tuple(values["tokens"]), tuple(values["nll"]), tuple(values["kl"]))


def built_of(values: Mapping[str, Any]) -> Built:
    return Built(values["bytes"], tuple(values["notes"]))


def confirmation_of(values: Mapping[str, Any]) -> Confirmation:
    return Confirmation(values["quality"], duel_of(values["duel"]), tuple(values["notes"]))
