"""A workshop whose every figure is known: what a search must find in it can be told beforehand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from miaotui.accelerate.goals import COSTS
from miaotui.accelerate.search.attempt import Plan
from miaotui.accelerate.search.journal import Journal
from miaotui.accelerate.search.ledger import Ledger
from miaotui.accelerate.search.sample import Pick, Sampler
from miaotui.accelerate.search.search import Outcome, search
from miaotui.accelerate.search.space import DEFAULT, ORIGINAL, Candidate, Serving, Space
from miaotui.accelerate.search.trial import Built, Confirmation, Duel, Scores
from miaotui.compress.recipe import Recipe
from miaotui.errors import ResourceError

TOKENS = 256

GAINS = {"w4g128-sym": 3.4, "w4g64-sym": 3.2, "w4g32-sym": 3.0, "w8-sym": 1.8}
LOSSES = {"w4g128-sym": 0.05, "w4g64-sym": 0.03, "w4g32-sym": 0.012, "w8-sym": 0.0005}
METHOD = {"rtn": 1.0, "gptq": 0.25}


def gain_of(candidate: Candidate) -> float:
    """How fast it really is, as the ceiling model has it unless a test says otherwise."""
    gain = 1.0 if candidate.recipe is None else GAINS[candidate.recipe.scheme]
    serving = candidate.serving
    gain *= 0.7 if serving.compute == "fp32" else 1.0
    gain *= {None: 1.0, 1: 0.6, 4: 1.02}[serving.threads]
    return gain * (1.3 if serving.speculative else 1.0)


def loss_of(candidate: Candidate) -> float:
    """The true rise of log-perplexity."""
    loss = 0.0 if candidate.recipe is None else LOSSES[candidate.recipe.scheme] * METHOD[candidate.recipe.method]
    return loss + (0.001 if candidate.serving.kv_cache_dtype == "int8" else 0.0)


def noise(*key: Any) -> float:
    """A number from about −1.7 to 1.7 of variance 1, the same for the same key in any process."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return (int.from_bytes(digest[:8], "big") / 2**64 - 0.5) * math.sqrt(12)


@dataclass
class FakeWorkshop:
    """`clock` moves as work is done. `calls` has every action in order. `slow`: how many times slower a candidate runs
    at a moment, as machines that change their state make it."""

    windows: int = 64
    gain: Callable[[Candidate], float] = gain_of
    loss: Callable[[Candidate], float] = loss_of
    others: Callable[[int], float] = lambda call: 0.0
    slow: Callable[[Candidate, int], float] = lambda candidate, call: 1.0
    broken: frozenset[str] = frozenset()
    now: float = 0.0
    calls: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def build(self, candidate: Candidate) -> Built:
        recipe = candidate.recipe
        assert recipe is not None
        self._did(f"build {candidate.weights_key}", 4.0 if recipe.method == "rtn" else 20.0)
        if recipe.scheme in self.broken:
            raise ResourceError("There is no room for it.", "Make some.")
        return Built(1000)

    def score(self, candidate: Candidate, windows: range) -> Scores:
        self._did(f"score {candidate.answers_key} {windows}", 0.05 * len(windows))
        key = candidate.answers_key
        nll = [TOKENS * (self.loss(candidate) + 0.01 * noise(key, w)) for w in windows]
        kl = [TOKENS * self.loss(candidate) for w in windows if w < 8]
        return Scores((TOKENS,) * len(windows), tuple(nll), tuple(kl))

    def duel(self, candidate: Candidate, rounds: int, rival: Candidate = ORIGINAL) -> Duel:
        self._did(f"duel {candidate.key} {rounds} against {rival.key}", float(rounds))
        call = len(self.calls)

        def cost(one: Candidate, key: Any) -> float:
            return self.slow(one, call) / (self.gain(one) * (1 + 0.01 * noise(one.key, rounds, key)))

        before = tuple(dict.fromkeys(COSTS["balanced"], cost(rival, f"{r} before")) for r in range(rounds))
        after = tuple(dict.fromkeys(COSTS["balanced"], cost(candidate, r)) for r in range(rounds))
        return Duel(before, after, self.others(call))

    def confirm(self, candidate: Candidate) -> Confirmation:
        self._did(f"confirm {candidate.key}", 10.0)
        loss = self.loss(candidate)
        report = {
            "perplexity_ratio": math.exp(loss),
            "perplexity_ratio_stderr": 0.001,
            "perplexity_ratio_interval": [math.exp(loss) - 0.002, math.exp(loss) + 0.002],
        }
        return Confirmation(report, self.duel(candidate, 9))

    def _did(self, action: str, seconds: float) -> None:
        self.calls.append(action)
        self.now += seconds


def fake_space(*servings: Serving) -> Space:
    weights = [
        Candidate(Recipe(scheme=scheme, method=method), Serving(compute=compute))
        for scheme in GAINS
        for method in METHOD
        for compute in ("auto", "fp32")
    ]
    return Space(tuple(weights), servings or (Serving(speculative="ngram"), Serving(kv_cache_dtype="int8")))


def run_search(
    workshop: FakeWorkshop,
    journal: Journal,
    *,
    plan: Plan | None = None,
    space: Space | None = None,
    pick: Pick | None = None,
    told: list[str] | None = None,
) -> Outcome:
    """The ceiling model is `gain_of`, whatever the workshop's candidates really are."""
    plan = plan or Plan("latency", 0.01, 600.0)
    ledger = Ledger(journal, workshop, workshop.clock)
    tell = (lambda line: None) if told is None else told.append
    return search(plan, space or fake_space(), ledger, gain_of, pick or Sampler(plan.seed), tell)


__all__ = ["DEFAULT", "FakeWorkshop", "fake_space", "gain_of", "loss_of", "noise", "run_search"]
