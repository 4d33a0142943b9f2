"""Windows in an order that a seed decides: several tasks mixed by weight, read ahead by a thread.

Which window comes at which position follows from the seed and from a handful of counters, so that a resumed training
goes on with exactly the windows that would have come.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from miaotui.compress.train.corpus import Corpus

AHEAD = 3
"""Batches that are read before they are asked for."""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Position:
    """Where a loader stands: batches drawn, and of each task, windows drawn."""

    batch: int
    drawn: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """This process's windows `[windows, window]`, how many all processes have, and where the loader stands then."""

    tokens: Ids
    whole: int
    after: Position


@dataclass(frozen=True, eq=False)
class Order:
    """Which windows each batch has.

    Every task's windows come once before any comes twice. poisson: each window (of the only task) is in a batch with
    the probability size / windows, whatever else is, as differential privacy's accounting needs.
    """

    corpora: Sequence[Corpus]
    weights: Sequence[float]
    seed: int
    poisson: bool = False

    def start(self) -> Position:
        return Position(0, (0,) * len(self.corpora))

    def batch(self, at: Position, size: int) -> tuple[list[tuple[int, int]], Position]:
        """Task and window of each of a batch's places, and the position after it."""
        chance = np.random.default_rng([self.seed, 2, at.batch])
        if self.poisson:
            train = self.corpora[0].train
            chosen = train[chance.random(len(train)) < size / len(train)]
            return [(0, int(window)) for window in chosen], replace(at, batch=at.batch + 1)
        shares = np.array(self.weights) / sum(self.weights)
        drawn, found = list(at.drawn), []
        for task in chance.choice(len(self.corpora), size=size, p=shares).tolist():
            found.append((task, self._window(task, drawn[task])))
            drawn[task] += 1
        return found, Position(at.batch + 1, tuple(drawn))

    def _window(self, task: int, count: int) -> int:
        train = self.corpora[task].train
        epoch, place = divmod(count, len(train))
        return int(train[_shuffled(self.seed, task, epoch, len(train))[place]])


@lru_cache(maxsize=16)
def _shuffled(seed: int, task: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 3, task, epoch]).permutation(count)


class Loader:
    """Batches of `size` windows from a position on, of which this process has every `processes`-th.

    A thread reads ahead; `close` ends it.
    """

    def __init__(self, order: Order, size: int, at: Position, *, rank: int = 0, processes: int = 1) -> None:
        self.order = order
        self.size = size
        self.position = at
        self.rank = rank
        self.processes = processes
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(at,), name="loader", daemon=True)
        self._reader.start()

    def next(self) -> Batch:
        """The next batch; raises what went wrong in reading it."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        self.position = found.after
        return found

    def close(self) -> None:
        self._closing.set()
        while self._reader.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._reader.join(0.01)

    def _read(self, at: Position) -> None:
        try:
            while not self._closing.is_set():
                places, at = self.order.batch(at, self.size)
                own = places[self.rank :: self.processes]
                self._ready.put(Batch(self._gathered(own), len(places), at))
        except BaseException as error:
            self._ready.put(error)

    def _gathered(self, places: list[tuple[int, int]]) -> Ids:
        corpora = self.order.corpora
        if not places:
            return np.empty((0, corpora[0].windows.shape[1]), np.int32)
        return np.stack([np.array(corpora[task].windows[window], np.int32) for task, window in places])
