"""Windows that the student itself has written, for the teacher to judge.

A student that has only read others' text meets its own mistakes for the first time when it answers (Agarwal et al.
2023, arXiv 2306.13649). Who writes is given: the command line composes the student's folder and the engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miaotui.compress.train.corpus import Corpus
from miaotui.compress.train.student import Student
from miaotui.errors import MiaotuiError

Write = Callable[[Path, Sequence[Sequence[int]], int, int], Sequence[Sequence[int]]]
"""`write(folder, prompts, tokens, seed)`: after each prompt, exactly so many new token ids of the model in `folder`,
drawn at random from what it holds likely. The same arguments give the same ids."""

POOL = 64
"""Windows that are written at a time, at most."""
PROMPT = 0.25
"""Share of a window that is somebody else's."""


@dataclass(frozen=True, eq=False)
class OnPolicy:
    """Writes pools of windows; `folder` is for the student's weights while they are read."""

    write: Write
    corpora: Sequence[Corpus]
    folder: Path
    seed: int

    def pool(self, student: Student, step: int, count: int) -> NDArray[np.int32]:
        """`[min(count, POOL), window]` windows that the student as it is now goes on with. Raises MiaotuiError."""
        chance = np.random.default_rng([self.seed, 4, step])
        starts = self._starts(chance, min(count, POOL))
        window = starts.shape[1]
        cut = max(1, round(PROMPT * window))
        prompts = starts[:, :cut].tolist()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".student.") as made:
            student.write(Path(made) / "student", "float32")
            written = self.write(Path(made) / "student", prompts, window - cut, int(chance.integers(1 << 31)))
        if [len(ids) for ids in written] != [window - cut] * len(prompts):
            raise MiaotuiError("The student wrote windows of the wrong length.", "Leave out --on-policy.")
        return np.array([[*prompt, *ids] for prompt, ids in zip(prompts, written, strict=True)], np.int32)

    def _starts(self, chance: np.random.Generator, count: int) -> NDArray[np.int32]:
        train = [(corpus, int(window)) for corpus in self.corpora for window in corpus.train]
        chosen = chance.choice(len(train), size=count, replace=count > len(train))
        return np.stack([np.array(train[at][0].windows[train[at][1]], np.int32) for at in chosen])
