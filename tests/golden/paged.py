"""Drive an executor by hand: several sequences in scattered blocks, prefill in chunks, then one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.ops import BLOCK_SIZE, Executor, Step


class Paged:
    """Gives each of `count` sequences of `length` its own scattered blocks, and makes steps."""

    def __init__(self, count: int, length: int) -> None:
        each = -(-length // BLOCK_SIZE)
        self.blocks = count * each + 1
        order = np.random.default_rng(7).permutation(np.arange(1, self.blocks))
        self.table = order.reshape(count, each).astype(np.int32)
        self.done = [0] * count

    def step(self, runs: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int] | None = None) -> Step:
        """Append each run's tokens to its sequence; logits for every row unless `rows` are given."""
        tokens, positions, starts, lengths = [], [], [0], []
        for sequence, new in runs:
            positions += range(self.done[sequence], self.done[sequence] + len(new))
            tokens += list(new)
            self.done[sequence] += len(new)
            starts.append(len(tokens))
            lengths.append(self.done[sequence])
        wanted = range(len(tokens)) if rows is None else rows
        table = np.ascontiguousarray(self.table[[sequence for sequence, _ in runs]])
        return Step(*(_index(x) for x in (tokens, positions, starts, lengths)), table, _index(wanted))


def whole(executor: Executor, sequences: Sequence[Sequence[int]], chunks: Sequence[int]) -> list[NDArray[np.float32]]:
    """Logits of every position: all sequences side by side, chunk by chunk, the rest token by token."""
    paged = Paged(len(sequences), max(map(len, sequences)))
    executor.allocate_cache(paged.blocks)
    out: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    sizes = iter(chunks)
    while any(paged.done[s] < len(sequence) for s, sequence in enumerate(sequences)):
        size = next(sizes, 1)
        runs = [(s, sequence[paged.done[s] : paged.done[s] + size]) for s, sequence in enumerate(sequences)]
        runs = [(s, [int(token) for token in new]) for s, new in runs if len(new)]
        result = executor.run(paged.step(runs)).copy()
        start = 0
        for s, new in runs:
            out[s].append(result[start : start + len(new)])
            start += len(new)
    return [np.concatenate(parts) for parts in out]


def _index(values: Sequence[int] | range) -> NDArray[np.int32]:
    return np.array(list(values), dtype=np.int32)
