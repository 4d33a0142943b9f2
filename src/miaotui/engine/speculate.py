"""Speculation: tokens are guessed, run with a sequence's own in one step, and taken as far as they came true.

A guess never changes an answer. Each token is chosen from the model's own logits as it would have been without (the
same parameters, the same random number of its position), and the next guess counts only if it is that very token. For
a guess that is certain of one token this is exact rejection sampling (Leviathan et al. 2023; Chen et al. 2023): it is
accepted with the model's probability of it, and what replaces it has the model's distribution without it.

How far to guess is decided before each step, for all sequences together: the likeliest guesses first, up to the number
that promises the most tokens a second by the measured times of steps. Guesses that lose are so left out, request by
request; now and then one is tried again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from miaotui.engine.pace import Odds, Pace
from miaotui.engine.request import Sequence
from miaotui.engine.scheduler import Schedule, Scheduler
from miaotui.errors import UsageError

_GAIN = 1.02
"""Speculating must promise so much more than not speculating: measurements are not exact."""
_PATIENCE, _MOST_PATIENCE = 32, 512
"""Steps without a guess until one is tried again: at first, and after many that lost."""
_HOPELESS = 0.05
"""A guess less likely than this is not thought about."""
_CROWD, _MOST_REST = 8, 8
"""From so many sequences on, thinking costs: after a step in which nothing paid, some are not thought about."""


@dataclass(frozen=True)
class SpeculativeConfig:
    """How to guess; vLLM's names. `model` is a draft model, None the prompt look-up."""

    num_speculative_tokens: int
    """The most that is guessed at once for a sequence."""
    model: str | None = None
    prompt_lookup_min: int = 2
    """Tokens that must have stood there before, for what followed them to be a guess."""
    prompt_lookup_max: int = 8
    """Tokens beyond which a longer match is no better."""

    @classmethod
    def parse(cls, given: str | Mapping[str, Any] | None) -> SpeculativeConfig | None:
        """From `ngram`, a mapping of vLLM's `speculative_config`, or that as JSON. Raises UsageError."""
        if given is None:
            return None
        settings = {} if given == "ngram" else dict(_from_json(given) if isinstance(given, str) else given)
        method = settings.pop("method", "draft_model" if "model" in settings else "ngram")
        if method not in _METHODS:
            raise UsageError(f"The speculative method is {method!r:.40}.", f"Choose one of {', '.join(_METHODS)}.")
        names, longest = _METHODS[method]
        for name, value in settings.items():
            if name not in names:
                raise UsageError(
                    f"Speculation by {method} knows no setting {name!r:.40}.", f"Choose of {', '.join(names)}."
                )
            sound = isinstance(value, str) if name == "model" else type(value) is int and 1 <= value <= _MOST
            if not sound:
                hint = "Name a model." if name == "model" else f"Give a whole number from 1 to {_MOST}."
                raise UsageError(f"The speculative setting {name} is {value!r:.40}.", hint)
        if "model" in names and "model" not in settings:
            raise UsageError("Speculation by draft_model has no model.", 'Name the draft model as "model".')
        config = cls(**{"num_speculative_tokens": longest, **settings})
        if not 2 <= config.prompt_lookup_min <= config.prompt_lookup_max:
            raise UsageError(
                f"Look-ups of {config.prompt_lookup_min} to {config.prompt_lookup_max} tokens find nothing.",
                "Give a prompt_lookup_min of at least 2 and at most prompt_lookup_max.",
            )
        return config


_MOST = 64
_METHODS = {
    "ngram": (("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"), 8),
    "draft_model": (("model", "num_speculative_tokens"), 4),
}
"""The settings of each method, and how much it guesses when that is not said."""


class Proposer(Protocol):
    """Where guesses come from."""

    cost: float
    """Seconds that each further token of the longest draft takes to guess, for all sequences together."""

    def offer(self, sequence: Sequence, longest: int) -> tuple[int | str, int] | None:
        """The kind of draft there would be now and its length, at most `longest`; None: there is none.

        Drafts of a kind are believed to come true equally often.
        """
        ...

    def propose(self, lengths: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts of at most these lengths, for sequences that were just offered one."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Record:
    """One sequence's experience."""

    odds: Odds
    kind: int | str = ""
    """Of the draft that runs now."""
    idle: int = 0
    """Steps since a guess was worth trying, while there was one."""
    patience: int = _PATIENCE


class Speculator:
    """Decides, proposes and learns."""

    def __init__(self, proposer: Proposer, config: SpeculativeConfig) -> None:
        self._proposer = proposer
        self._longest = config.num_speculative_tokens
        self._pace = Pace()
        self._odds = Odds()
        self._records: dict[Sequence, _Record] = {}
        self._rest = self._next_rest = 0
        self.drafts = self.proposed = self.accepted = 0
        self.accepted_at = [0] * self._longest
        """How many drafts came true up to each of their tokens."""

    def draft(self, plan: Schedule, scheduler: Scheduler) -> None:
        """Add drafts to a step, in the room that its own tokens leave."""
        if self._rest > 0:
            self._rest -= 1
            return
        offers = {}
        going = [sequence for sequence in plan.counts if sequence.remaining == 1 and sequence.output_len]
        for sequence in going:
            longest = min(self._longest, sequence.request.max_tokens - sequence.output_len - 1)
            offer = self._proposer.offer(sequence, longest) if longest > 0 and sequence.request.beam is None else None
            if offer is not None:
                record = self._records.setdefault(sequence, _Record(Odds(self._odds)))
                record.kind = offer[0]
                offers[sequence] = offer[1]
        lengths = self._lengths(len(going), sum(plan.counts.values()), offers) if offers else {}
        if len(going) >= _CROWD:
            self._rest = self._next_rest = 0 if lengths else min(2 * self._next_rest + 1, _MOST_REST)
        for sequence, tokens in self._proposer.propose(lengths).items() if lengths else ():
            drafted = len(scheduler.draft(plan, sequence, tokens))
            self.drafts += drafted > 0
            self.proposed += drafted

    def ran(self, plan: Schedule, seconds: float) -> None:
        """Learn from a step's time."""
        self._pace.observe(sum(plan.counts.values()), seconds)

    def judge(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        """Learn what became of a sequence's draft. Of one that has ended nothing is learnt: it was cut short."""
        self.accepted += accepted
        for place in range(accepted):
            self.accepted_at[place] += 1
        record = self._records.get(sequence)
        if record is not None:
            record.odds.judge(record.kind, proposed, accepted)

    def forget(self, sequence: Sequence) -> None:
        self._records.pop(sequence, None)
        self._proposer.forget(sequence)

    def close(self) -> None:
        self._proposer.close()

    def _lengths(self, tokens: float, rows: int, offers: dict[Sequence, int]) -> dict[Sequence, int]:
        """How many tokens to guess for each: those likeliest to come true, as many as promise the best speed.

        Without guesses the step has `rows` rows and gives `tokens` tokens.
        """
        chances: list[tuple[float, int, Sequence]] = []
        for sequence, longest in offers.items():
            record = self._records[sequence]
            chance, following = record.odds.first(record.kind), record.odds.next(record.kind)
            for place in range(1, longest + 1):
                if chance < _HOPELESS:
                    break
                chances.append((chance, place, sequence))
                chance *= following
        chances.sort(key=lambda entry: -entry[0])
        best, taken, deepest = _GAIN * tokens / self._pace(rows), 0, 0
        step = self._proposer.cost / self._pace.scale if self._pace.scale else 0.0
        for count, (chance, place, _) in enumerate(chances, start=1):
            tokens, deepest = tokens + chance, max(deepest, place)
            speed = tokens / (self._pace(rows + count) + step * deepest)
            if speed > best:
                best, taken = speed, count
        lengths: dict[Sequence, int] = {}
        for _, place, sequence in chances[:taken]:
            lengths[sequence] = max(place, lengths.get(sequence, 0))
        self._try_again(offers, lengths)
        return lengths

    def _try_again(self, offers: dict[Sequence, int], lengths: dict[Sequence, int]) -> None:
        """Add one guess for those that had none for long: what was learnt may hold no more."""
        for sequence in offers:
            record = self._records[sequence]
            record.idle += 1
            if sequence in lengths:
                record.idle, record.patience = 0, _PATIENCE
            elif record.idle >= record.patience:
                record.idle, record.patience = 0, min(2 * record.patience, _MOST_PATIENCE)
                lengths[sequence] = 1


def _from_json(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"The speculative setting {text!r:.60} is neither a method nor JSON.",
            'Write ngram, or {"model": "…", "num_speculative_tokens": 4}.',
        )
    return found
