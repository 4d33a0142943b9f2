"""From logits to tokens. A choice depends on the logits, the parameters and (seed, index, position) alone.

The order of the controls is vLLM's: the log-probabilities that are reported are the model's own, before any of them;
then masks and penalties (processors.py), temperature, min-p, top-k, top-p (draws.py).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple, TypeVar, cast

import numpy as np

from miaotui.engine.draws import Draws, Logits, Score
from miaotui.engine.params import SamplingParams
from miaotui.engine.request import Logprob, Sequence

T = TypeVar("T")

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
NOTHING_LEFT = -1
"""Chosen when the controls together leave no token: the sequence ends."""


class Choice(NamedTuple):
    """The token chosen for one row; `logprobs` when they were asked for."""

    token: int
    logprobs: dict[int, Logprob] | None = None


def mix(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def uniform(seed: int, index: int, position: int) -> float:
    """The random number of one draw, in [0, 1), from nothing but these three.

    All arithmetic is modulo 2**64, with G = 0x9E3779B97F4A7C15:

        a = mix(seed + G · (index + 1))        index: which of the request's n continuations
        b = mix(a + G · (position + 1))        position: of the token being chosen, the prompt counted
        u = (b >> 11) · 2**-53
    """
    stream = mix(seed + _GOLDEN * (index + 1))
    return (mix(stream + _GOLDEN * (position + 1)) >> 11) * 2.0**-53


class Sampler:
    """Chooses one token for each row. `decode` names a token in the log-probabilities."""

    def __init__(self, draws: Draws, decode: Callable[[int], str]) -> None:
        self._draws = draws
        self._decode = decode

    def sample(self, logits: Logits, rows: list[int], sequences: Many[Sequence]) -> list[Choice]:
        """The next token of each sequence, from its row of `logits` [rows, vocabulary], which are left as they are."""
        if all(sequence.plain for sequence in sequences):
            return [Choice(token) for token in self._draws.likeliest(logits, rows)]
        plain = [i for i, sequence in enumerate(sequences) if not sequence.processors]
        changed = [i for i, sequence in enumerate(sequences) if sequence.processors]
        tokens = dict(zip(plain, self.pick(logits, _at(rows, plain), _at(sequences, plain)), strict=True))
        if changed:
            processed = _process(logits[_at(rows, changed)], _at(sequences, changed))
            picked = self.pick(processed, list(range(len(changed))), _at(sequences, changed))
            nothing = (processed.max(axis=1) == -np.inf).tolist()
            tokens |= {i: NOTHING_LEFT if n else t for i, t, n in zip(changed, picked, nothing, strict=True)}
        return self._scored(logits, rows, sequences, [tokens[i] for i in range(len(rows))])

    def score(self, logits: Logits, rows: Many[int], tokens: Many[int], top: int) -> list[dict[int, Logprob]]:
        """Log-probabilities of one token of each row and of its `top` likeliest (-1: all), that token first."""
        scores = self._draws.score(logits, rows, tokens, logits.shape[1] if top < 0 else top)
        return [self._named(token, score) for token, score in zip(tokens, scores, strict=True)]

    def pick(self, logits: Logits, rows: list[int], sequences: Many[Sequence]) -> list[int]:
        """The likeliest token, or a draw, from each of `rows`, for what comes next in each sequence."""
        params = [cast(SamplingParams, sequence.request.params) for sequence in sequences]
        greedy = [i for i, p in enumerate(params) if p.greedy]
        drawn = [i for i, p in enumerate(params) if not p.greedy]
        picked = dict(zip(greedy, self._draws.likeliest(logits, _at(rows, greedy)), strict=True))
        if drawn:
            uniforms = [uniform(s.request.seed, s.index, len(s.tokens)) for s in _at(sequences, drawn)]
            tokens = self._draws.draw(logits, _at(rows, drawn), _at(params, drawn), uniforms)
            picked |= zip(drawn, tokens, strict=True)
        return [picked[i] for i in range(len(rows))]

    def _scored(self, logits: Logits, rows: list[int], sequences: Many[Sequence], tokens: list[int]) -> list[Choice]:
        """The choices, with log-probabilities where they were asked for."""
        choices = [Choice(token) for token in tokens]
        by_top: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            top = cast(SamplingParams, sequence.request.params).logprobs
            if top is not None and tokens[i] != NOTHING_LEFT:
                by_top.setdefault(top, []).append(i)
        for top, wanted in by_top.items():
            for i, found in zip(wanted, self.score(logits, _at(rows, wanted), _at(tokens, wanted), top), strict=True):
                choices[i] = Choice(tokens[i], found)
        return choices

    def _named(self, token: int, score: Score) -> dict[int, Logprob]:
        found = {token: Logprob(score.logprob, score.rank, self._decode(token))}
        for rank, (other, logprob) in enumerate(score.likeliest, start=1):
            if other != token:
                found[other] = Logprob(logprob, rank, self._decode(other))
        return found


def _at(of: Many[T], places: list[int]) -> list[T]:
    return [of[i] for i in places]


def _process(rows: Logits, sequences: Many[Sequence]) -> Logits:
    """Let each sequence's processors change its row, in place."""
    for row, sequence in zip(rows, sequences, strict=True):
        for processor in sequence.processors or ():
            processor.apply(row, sequence.tokens)
    return rows
