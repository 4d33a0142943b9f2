"""Beam search over an engine's sequences, with the rules of transformers' `generate` (generation/utils.py, v5).

Each open beam is a sequence. It offers its best continuations when its logits arrive and then pauses, for its siblings
may run in other steps; once all have offered, the best of all are chosen and the beams go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miaotui.engine.draws import likeliest, log_softmax
from miaotui.engine.params import BeamSearchParams
from miaotui.engine.request import FinishReason, Request, Sequence


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible continuation: `total` is the summed log-probability of the beam and `token`."""

    total: float
    parent: Sequence
    token: int


@dataclass(frozen=True, slots=True)
class FinishedBeam:
    score: float
    total: float
    token_ids: list[int]
    reason: FinishReason


class BeamSearch:
    """The state of one request's search. It chooses; the engine forks, appends and removes sequences."""

    def __init__(self, request: Request, params: BeamSearchParams) -> None:
        self._params = params
        self._stops = request.stop_tokens
        self._max_tokens = request.max_tokens
        self._wanted = max(2, 1 + len(self._stops)) * params.beam_width
        self._totals: dict[Sequence, float] = {request.sequences[0]: 0.0}
        self._offers: dict[Sequence, list[Candidate]] = {}
        self.finished: list[FinishedBeam] = []
        """At most `beam_width`, the best first."""

    @property
    def ready(self) -> bool:
        """Whether every open beam has offered its continuations."""
        return len(self._offers) == len(self._totals)

    def offer(self, beam: Sequence, logits: NDArray[np.float32]) -> None:
        """Note the best continuations of one open beam, from its row of logits."""
        scores = log_softmax(logits)
        best = likeliest(scores, self._wanted).tolist()
        self._offers[beam] = [Candidate(self._totals[beam] + float(scores[t]), beam, t) for t in best]

    def choose(self) -> list[Candidate]:
        """The continuations that stay open, best first; none when the search has ended."""
        every = [candidate for beam in self._totals for candidate in self._offers[beam]]
        ranked = sorted(every, key=lambda candidate: -candidate.total)[: self._wanted]
        length = next(iter(self._totals)).output_len + 1
        at_limit = length >= self._max_tokens
        for candidate in ranked[: self._params.beam_width]:
            if at_limit or candidate.token in self._stops:
                self._finish(candidate, length)
        open_ = [c for c in ranked if c.token not in self._stops][: self._params.beam_width]
        self._offers.clear()
        return [] if at_limit or not open_ or self._settled(open_[0].total, length) else open_

    def follow(self, beams: list[tuple[Sequence, float]]) -> None:
        """Take these sequences, with their summed log-probabilities, as the open beams."""
        self._totals = dict(beams)

    def _finish(self, candidate: Candidate, length: int) -> None:
        score = candidate.total / length**self._params.length_penalty
        reason: FinishReason = "stop" if candidate.token in self._stops else "length"
        tokens = [*candidate.parent.output_token_ids, candidate.token]
        self.finished.append(FinishedBeam(score, candidate.total, tokens, reason))
        self.finished.sort(key=lambda beam: -beam.score)
        del self.finished[self._params.beam_width :]

    def _settled(self, best_total: float, length: int) -> bool:
        """Whether no open beam can, or may, displace a finished one."""
        if len(self.finished) < self._params.beam_width:
            return False
        best = best_total / length**self._params.length_penalty
        return self._params.early_stopping or best <= self.finished[-1].score
