"""Draws and scores by the native kernels: one call for all rows, without Python's lock, on the threads that run the
steps. Importing needs them built."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from miaotui.backends.cpu import _native
from miaotui.backends.ops import Executor
from miaotui.engine.draws import Logits, Score
from miaotui.engine.params import SamplingParams


class NativeDraws:
    """On the threads of the `executor`, which must be idle then, or on the caller's. `isa` names an instruction set of
    `_native.isas()`; None means the best."""

    def __init__(self, executor: Executor | None = None, isa: str | None = None) -> None:
        self._executor = executor  # not its pool, which goes when it is closed
        self._isa = isa or _native.isas()[0]

    def _pool(self) -> _native.Pool | None:
        return None if self._executor is None else self._executor.pool

    def likeliest(self, logits: Logits, rows: Many[int]) -> list[int]:
        noted = None if self._executor is None else self._executor.likeliest(logits, rows)
        if noted is not None:
            return noted
        tokens = np.empty(len(rows), np.int32)
        _native.likeliest_rows(self._pool(), logits, np.array(rows, np.int32), tokens, self._isa)
        return tokens.tolist()

    def draw(self, logits: Logits, rows: Many[int], params: Many[SamplingParams], uniforms: Many[float]) -> list[int]:
        tokens = np.empty(len(rows), np.int32)
        _native.draw_rows(
            self._pool(),
            logits,
            np.array(rows, np.int32),
            np.array([1.0 / p.temperature for p in params], np.float32),
            np.array([max(p.top_k, 0) for p in params], np.int32),
            np.array([p.top_p for p in params], np.float64),
            np.array([p.min_p for p in params], np.float32),
            np.array(uniforms, np.float64),
            tokens,
            self._isa,
        )
        return tokens.tolist()

    def score(self, logits: Logits, rows: Many[int], tokens: Many[int], top: int) -> list[Score]:
        count, top = len(rows), min(top, logits.shape[1])
        logprob, rank = np.empty(count), np.empty(count, np.int32)
        ids, logprobs = np.empty((count, top), np.int32), np.empty((count, top))
        _native.score_rows(
            self._pool(),
            logits,
            np.array(rows, np.int32),
            np.array(tokens, np.int32),
            logprob,
            rank,
            ids,
            logprobs,
            self._isa,
        )
        pairs = [list(zip(i, p, strict=True)) for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True)]
        return [Score(*found) for found in zip(logprob.tolist(), rank.tolist(), pairs, strict=True)]
