"""The residual stream of all windows between two layers, in a file: memory holds a few windows of it at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

TOKENS_AT_ONCE = 2048
"""Tokens that go through a layer together."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """`[windows, tokens, hidden]` float32 in a file that is mapped chunk by chunk.

    A layer's own file has the `mark` of the stream after it: by that a file that a crash left half-written is known.
    """

    path: Path
    shape: tuple[int, int, int]

    def chunks(self) -> Iterator[slice]:
        """Runs of windows of at most TOKENS_AT_ONCE tokens."""
        windows, length, _ = self.shape
        step = max(1, TOKENS_AT_ONCE // length)
        for start in range(0, windows, step):
            yield slice(start, min(start + step, windows))

    def create(self) -> None:
        """An empty file of the right size."""
        with self.path.open("wb") as file:
            file.truncate(4 * int(np.prod(self.shape)))

    def read(self, chosen: slice) -> torch.Tensor:
        """A copy of some windows."""
        return torch.from_numpy(np.array(self._map(chosen, "r")))

    def write(self, chosen: slice, values: torch.Tensor) -> None:
        mapped = self._map(chosen, "r+")
        mapped[...] = values.cpu().numpy()

    def all(self) -> torch.Tensor:
        """Every window, as a view of the file that must not be written to."""
        return torch.from_numpy(np.memmap(self.path, np.float32, "c", 0, self.shape))

    def _map(self, chosen: slice, mode: str) -> NDArray[np.float32]:
        _, length, width = self.shape
        count = chosen.stop - chosen.start
        offset = 4 * chosen.start * length * width
        return np.memmap(self.path, np.float32, mode, offset, (count, length, width))  # type: ignore[call-overload, no-any-return]

    def mark(self) -> str | None:
        """A sum of all its bits, which a file that a crash left half-written does not have; None without a file."""
        if not self.path.is_file() or self.path.stat().st_size != 4 * int(np.prod(self.shape)):
            return None
        total = sum(int(self._map(chosen, "r").view(np.uint32).sum(dtype=np.uint64)) for chosen in self.chunks())
        return f"{total:x}"

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)

    def map(self, to: Hidden, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put every chunk through `step` into another file."""
        to.create()
        for chosen in self.chunks():
            to.write(chosen, step(self.read(chosen)))


def at(folder: Path, name: str, layer: int, shape: tuple[int, int, int]) -> Hidden:
    """The stream that goes into a layer."""
    return Hidden(folder / f"{name}-{layer:03d}.bin", shape)


def drop_others(folder: Path, name: str, keep: frozenset[int] = frozenset()) -> None:
    """Remove the streams of all other layers."""
    for path in folder.glob(f"{name}-*.bin"):
        number = path.stem.rpartition("-")[2]
        if number.isdigit() and int(number) not in keep:
            os.unlink(path)
