"""Drawing tokens from rows of logits, and scoring them: the plain numpy version, and which version is used.

`NativeDraws` (native_draws.py) does the same in one call for all rows of a step, and is what runs where the native
kernels are built. Both choose the same token from the same uniform number, but for ties within float rounding.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.ops import Executor
from miaotui.engine.params import SamplingParams

Row = NDArray[np.float32]
Logits = NDArray[np.float32]

_FIRST_LOOK = 512
"""How many of the likeliest tokens top-p sorts before it gives up and sorts them all."""


class Score(NamedTuple):
    """A token's natural log-probability and rank (from 1) in a row, and the likeliest tokens, best first."""

    logprob: float
    rank: int
    likeliest: list[tuple[int, float]]


class Draws(Protocol):
    def likeliest(self, logits: Logits, rows: Many[int]) -> list[int]:
        """The greatest of each of `rows` of logits [rows, vocabulary], of equals the first."""
        ...

    def draw(self, logits: Logits, rows: Many[int], params: Many[SamplingParams], uniforms: Many[float]) -> list[int]:
        """A token for each of `rows` of logits [rows, vocabulary]: see `draw` below."""
        ...

    def score(self, logits: Logits, rows: Many[int], tokens: Many[int], top: int) -> list[Score]:
        """Score one token of each of `rows`, with the `top` likeliest; of equals the smaller id comes first."""
        ...


class NumpyDraws:
    """Row by row."""

    def likeliest(self, logits: Logits, rows: Many[int]) -> list[int]:
        return [int(logits[row].argmax()) for row in rows]

    def draw(self, logits: Logits, rows: Many[int], params: Many[SamplingParams], uniforms: Many[float]) -> list[int]:
        return [draw(logits[row], p, u) for row, p, u in zip(rows, params, uniforms, strict=True)]

    def score(self, logits: Logits, rows: Many[int], tokens: Many[int], top: int) -> list[Score]:
        return [score(logits[row], token, top) for row, token in zip(rows, tokens, strict=True)]


def best_draws(executor: Executor | None = None) -> Draws:
    """The native version where it is built, on the executor's threads, else numpy's."""
    try:
        from miaotui.engine.native_draws import NativeDraws
    except ImportError:
        return NumpyDraws()
    return NativeDraws(executor)


def draw(row: Row, params: SamplingParams, u: float) -> int:
    """Sample a token: the kept tokens in order of their ids, the first whose summed weight exceeds u · total."""
    scaled = row * np.float32(1.0 / params.temperature)
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


def score(row: Row, token: int, top: int) -> Score:
    """One token's Score."""
    scores = log_softmax(row)
    best = [(other, float(scores[other])) for other in likeliest(scores, top).tolist()]
    return Score(float(scores[token]), int((scores > scores[token]).sum()) + 1, best)


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
