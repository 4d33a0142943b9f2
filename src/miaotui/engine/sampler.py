"""From logits to tokens. Pure numpy; a draw depends on the logits, the parameters and (seed, index, position) alone.

The order of the controls is vLLM's: the log-probabilities that are reported are the model's own, before any of them;
then masks and penalties (processors.py), temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from miaotui.engine.params import SamplingParams
from miaotui.engine.request import Logprob, Sequence

Row = NDArray[np.float32]

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
NOTHING_LEFT = -1
"""Chosen when the controls together leave no token: the sequence ends."""

_FIRST_LOOK = 512
"""How many of the likeliest tokens top-p sorts before it gives up and sorts them all."""


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

    def __init__(self, decode: Callable[[int], str]) -> None:
        self._decode = decode

    def sample(self, logits: NDArray[np.float32], rows: list[int], sequences: Many[Sequence]) -> list[Choice]:
        """The next token of each sequence, from its row of `logits` [rows, vocabulary], which are left as they are."""
        if all(sequence.plain for sequence in sequences):
            if rows != list(range(len(logits))):
                logits = logits[rows]
            return [Choice(token) for token in logits.argmax(axis=1).tolist()]
        return [self._choose(logits[row], sequence) for row, sequence in zip(rows, sequences, strict=True)]

    def _choose(self, row: Row, sequence: Sequence) -> Choice:
        params = cast(SamplingParams, sequence.request.params)
        shaped = row
        if sequence.processors:
            shaped = row.copy()
            for processor in sequence.processors:
                processor.apply(shaped, sequence.tokens)
            if shaped.max() == -np.inf:
                return Choice(NOTHING_LEFT)
        if params.greedy:
            token = int(shaped.argmax())
        else:
            token = draw(shaped, params, uniform(sequence.request.seed, sequence.index, len(sequence.tokens)))
        if params.logprobs is None:
            return Choice(token)
        return Choice(token, token_logprobs(row, token, params.logprobs, self._decode))


def draw(row: Row, params: SamplingParams, u: float) -> int:
    """Sample a token: the kept tokens in order of their ids, the first whose summed weight exceeds u · total."""
    scaled = row / np.float32(params.temperature)
    weights = np.exp(scaled - scaled.max())
    kept = keep(weights, params)
    heights = np.cumsum(weights if kept is None else weights[kept], dtype=np.float64)
    at = min(int(np.searchsorted(heights, u * heights[-1], side="right")), len(heights) - 1)
    return at if kept is None else int(kept[at])


def keep(weights: Row, params: SamplingParams) -> NDArray[np.intp] | None:
    """The ids, ascending, that min-p, then top-k, then top-p leave; None means all. weights: largest is 1."""
    kept: NDArray[np.intp] | None = None
    floor = np.float32(params.min_p)
    if 0 < params.top_k < len(weights):
        floor = max(floor, np.partition(weights, -params.top_k)[-params.top_k])
    if floor > 0.0:
        kept = np.flatnonzero(weights >= floor)
        weights = weights[kept]
    if params.top_p < 1.0:
        within = _nucleus(weights, params.top_p)
        kept = within if kept is None else kept[within]
    return kept


def _nucleus(weights: Row, top_p: float) -> NDArray[np.intp]:
    """Ids, ascending, of the fewest likeliest tokens that hold `top_p` of the weight; of equals the smaller id."""
    wanted = top_p * float(weights.sum(dtype=np.float64))
    for look in (min(_FIRST_LOOK, len(weights)), len(weights)):
        largest = np.sort(np.partition(weights, -look)[-look:])[::-1]
        heights = np.cumsum(largest, dtype=np.float64)
        if heights[-1] >= wanted:
            break
    count = min(int(np.searchsorted(heights, wanted, side="left")) + 1, len(largest))
    kept = np.flatnonzero(weights >= largest[count - 1])
    if len(kept) == count:
        return kept
    equals = np.flatnonzero(weights[kept] == largest[count - 1])
    return np.delete(kept, equals[count - len(kept) :])


def log_softmax(row: Row) -> NDArray[np.float64]:
    """Natural log-probabilities of one row of logits."""
    shifted = row.astype(np.float64) - float(row.max())
    return cast("NDArray[np.float64]", shifted - np.log(np.exp(shifted).sum()))


def likeliest(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest, best first; of equals the smaller index."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    candidates = np.flatnonzero(scores >= np.partition(scores, -count)[-count]) if count else np.arange(0)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


def token_logprobs(row: Row, token: int, top: int, decode: Callable[[int], str]) -> dict[int, Logprob]:
    """Log-probabilities of `token` and of the `top` likeliest tokens (-1: all), the chosen one first."""
    scores = log_softmax(row)
    count = len(scores) if top < 0 else min(top, len(scores))
    found = {token: Logprob(float(scores[token]), int((scores > scores[token]).sum()) + 1, decode(token))}
    for rank, other in enumerate(likeliest(scores, count).tolist(), start=1):
        if other != token:
            found[other] = Logprob(float(scores[other]), rank, decode(other))
    return found
