"""How long steps take and how often drafts come true: what decides whether to speculate, and how far."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass

_EXACT_ROWS = 16
"""Up to here every number of rows is measured by itself: kernels change their tiling there."""
_PER_DOUBLING = 8
"""Beyond it, so many measured sizes for each doubling."""
_HOPE = 0.03
"""What one more row is thought to cost, of a step, before a larger step was ever measured: little, so that one is."""
_WILD = 3.0
"""A measurement further from what was expected than by this factor counts as being off by it."""

_QUICK, _SLOW = 0.2, 0.01
"""How much of a deviation the scale, and the shape of a size that is known well, take over at once."""


class Pace:
    """Seconds of a step by its number of rows, as measured on this machine, now.

    seconds = scale · shape[rows]. The scale follows the machine's moods and the growing contexts quickly, by the sizes
    that are known well; the shape, which alone decides, is an average of everything seen. So sizes that were not run
    lately can still be compared with those that were.
    """

    def __init__(self) -> None:
        self._scale: float | None = None
        self._sizes: list[int] = []
        self._shape: dict[int, float] = {}
        self._seen: dict[int, int] = {}

    def observe(self, rows: int, seconds: float) -> None:
        """Note one step. The first of a size is not counted: it touches its memory for the first time."""
        size = _size(rows)
        seen = self._seen[size] = self._seen.get(size, 0) + 1
        if seen == 1:
            return
        expected = self(rows)
        if self._scale is None:
            self._scale = seconds / expected
        ratio = min(max(seconds / (self._scale * expected), 1 / _WILD), _WILD)
        if size not in self._shape:
            self._sizes.insert(bisect_left(self._sizes, size), size)
            self._shape[size] = expected
        self._shape[size] *= ratio ** max(_SLOW, 1 / (seen - 1))
        self._scale *= ratio ** (_QUICK * min(1.0, (seen - 1) * _SLOW))
        self._correct(self._sizes.index(size))

    def _correct(self, at: int) -> None:
        """A larger step takes no less: of two neighbours that say otherwise the one seen more often is right."""
        for first in (at - 1, at):
            if 0 <= first < len(self._sizes) - 1:
                small, large = self._sizes[first], self._sizes[first + 1]
                if self._shape[small] > self._shape[large]:
                    right = small if self._seen[small] >= self._seen[large] else large
                    self._shape[small] = self._shape[large] = self._shape[right]

    def __call__(self, rows: int) -> float:
        """What a step of so many rows takes, in units of nothing in particular."""
        size = _size(rows)
        known = self._shape.get(size)
        if known is not None:
            return known
        at = bisect_left(self._sizes, size)
        if at == 0:
            return self._shape[self._sizes[0]] if self._sizes else 1.0 + _HOPE * (size - 1)
        below = self._sizes[at - 1]
        if at == len(self._sizes):
            return self._shape[below] * (1.0 + _HOPE * (size - below))
        above = self._sizes[at]
        share = (size - below) / (above - below)
        return self._shape[below] * (1 - share) + self._shape[above] * share

    @property
    def scale(self) -> float:
        """Seconds of one unit; 0 before anything was measured."""
        return self._scale or 0.0


def _size(rows: int) -> int:
    """The measured size that stands for `rows`."""
    if rows <= _EXACT_ROWS:
        return rows
    step = round(_PER_DOUBLING * math.log2(rows / _EXACT_ROWS))
    return int(_EXACT_ROWS * 2.0 ** (step / _PER_DOUBLING))


@dataclass(slots=True)
class _Tally:
    tried: float = 0.0
    came: float = 0.0

    def add(self, tried: float, came: float, memory: float) -> None:
        self.tried = self.tried * memory + tried
        self.came = self.came * memory + came


class Odds:
    """How often drafts of each kind come true: their first token, and the following ones after a right one.

    Running averages. What has seen little of its own leans on `prior`: a request's odds on those of all requests.
    """

    def __init__(self, prior: Odds | None = None) -> None:
        self._prior = prior
        self._memory = 0.998 if prior is None else 0.97
        self._tallies: dict[Hashable, tuple[_Tally, _Tally]] = {}

    def first(self, kind: Hashable) -> float:
        """The chance that a draft's first token is right."""
        return self._chance(kind, 0)

    def next(self, kind: Hashable) -> float:
        """The chance that a token is right when those before it in the draft were."""
        return self._chance(kind, 1)

    def judge(self, kind: Hashable, proposed: int, accepted: int) -> None:
        """Note what became of one draft."""
        first, rest = self._tallies.setdefault(kind, (_Tally(), _Tally()))
        first.add(1, min(accepted, 1), self._memory)
        if accepted and proposed > 1:
            rest.add(min(accepted + 1, proposed) - 1, accepted - 1, self._memory)
        if self._prior is not None:
            self._prior.judge(kind, proposed, accepted)

    def _chance(self, kind: Hashable, which: int) -> float:
        if self._prior is None:
            before, weight = (0.6, 0.8)[which], 2.0
        else:
            before, weight = self._prior._chance(kind, which), 4.0
        tally = self._tallies[kind][which] if kind in self._tallies else _Tally()
        return (tally.came + weight * before) / (tally.tried + weight)
