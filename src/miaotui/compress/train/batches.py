"""What each step reads: windows of the text, and windows that the student has written."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from miaotui.compress.train.group import Group
from miaotui.compress.train.loader import Loader, Order, Position
from miaotui.compress.train.objective import Windows
from miaotui.compress.train.on_policy import OnPolicy
from miaotui.compress.train.settings import Settings
from miaotui.compress.train.student import Student


class Batches:
    """This process's share of each batch. `close` ends the thread that reads ahead.

    own: windows of a batch that the student has written, drawn from `pool`, which it writes anew now and then.
    """

    def __init__(
        self,
        order: Order,
        settings: Settings,
        group: Group,
        on_policy: OnPolicy | None,
        position: Position,
        pool: NDArray[np.int32] | None,
    ) -> None:
        self.settings = settings
        self.group = group
        self.on_policy = on_policy
        self.own = 0 if on_policy is None else round(settings.on_policy * settings.batch)
        self.read = settings.batch - self.own
        self.pool = pool
        self._loader = Loader(order, max(1, self.read), position, rank=group.rank, processes=group.size)

    @property
    def position(self) -> Position:
        """Where the loader stands; with the step and the pool, all that decides what comes."""
        return self._loader.position

    def next(self, student: Student, step: int) -> Windows:
        settings = self.settings
        tokens = self._loader.next().tokens if self.read else np.empty((0, settings.window), np.int32)
        written = self._written(student, step)
        both = torch.from_numpy(np.concatenate([tokens, written])).to(settings.device)
        return Windows(both, torch.arange(len(both), device=settings.device) >= len(tokens))

    def close(self) -> None:
        self._loader.close()

    def _written(self, student: Student, step: int) -> NDArray[np.int32]:
        settings, group = self.settings, self.group
        if self.on_policy is None or not self.own:
            return np.empty((0, settings.window), np.int32)
        if self.pool is None or step % settings.on_policy_every == 0:
            wanted = self.own * settings.on_policy_every
            self.pool = group.share(self.on_policy.pool(student, step, wanted) if group.first else None)
        assert self.pool is not None
        chosen = np.random.default_rng([settings.seed, 5, step]).integers(len(self.pool), size=self.own)
        return self.pool[chosen[group.rank :: group.size]]
