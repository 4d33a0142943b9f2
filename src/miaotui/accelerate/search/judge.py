"""What a candidate loses against the original, window by window, on the text that is chosen by.

The original is run once, exactly, and what it said of each window is kept on disk: -log p of every token, and of the
first windows all logits, from which a divergence is computed. So a candidate costs one pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miaotui.accelerate.search.trial import Scores
from miaotui.checkpoint.write import atomic_file
from miaotui.measure.quality import EXACT, same_vocabulary
from miaotui.measure.quality_data import Window
from miaotui.measure.scoring import Logits, Opened, Rows, Scorer, Settings, Values

KEPT_BYTES = 512 << 20
"""Of the original's logits."""
MOST_KEPT = 4
"""Windows whose logits are kept."""


@dataclass
class Judge:
    """Owns the files in `folder`, and the scorer of the last candidate; `close` it, or `rest` to free its memory."""

    original: Opened
    windows: Sequence[Window]
    folder: Path
    threads: int | None = None

    def __post_init__(self) -> None:
        self._size = max(len(window.tokens) for window in self.windows)
        self._scorer: tuple[str, Settings, Scorer] | None = None

    def scores(self, model: str, settings: Settings, wanted: range) -> Scores:
        """The candidate in the file or folder `model` on these windows. Raises what loading it does."""
        self._record(wanted)
        scorer = self._load(model, settings)
        tokens, nll, kl = [], [], []
        with Rows(self.threads) as rows:
            for at in wanted:
                window, before = self.windows[at], np.load(self._nll(at))
                if self._logits(at).is_file():
                    found = rows.divergence(Recorded(self.original.model, self._logits(at), scorer), scorer, window)
                    after = found.nll
                    kl.append(float(found.kl.sum()))
                else:
                    after = rows.nll(scorer, window)
                tokens.append(len(window.targets))
                nll.append(float((after - before).sum()))
        return Scores(tuple(tokens), tuple(nll), tuple(kl))

    def rest(self) -> None:
        """Free the candidate."""
        if self._scorer is not None:
            self._scorer[2].close()
            self._scorer = None

    close = rest

    # -- inside ------------------------------------------------------------------------------------------
    def _load(self, model: str, settings: Settings) -> Scorer:
        if self._scorer is not None and self._scorer[:2] == (model, settings):
            return self._scorer[2]
        self.rest()
        opened = Opened.of(model)
        same_vocabulary(self.original, opened)
        self._scorer = (model, settings, opened.load(settings, self._size))
        return self._scorer[2]

    def _record(self, wanted: range) -> None:
        """Run the original on those of the windows that it was not run on."""
        missing = [at for at in wanted if not self._nll(at).is_file()]
        if not missing:
            return
        self.rest()
        self.folder.mkdir(parents=True, exist_ok=True)
        exact = Settings(EXACT.device, EXACT.compute, EXACT.kv_cache_dtype, self.threads)
        with Rows(self.threads) as rows, closing(self.original.load(exact, self._size)) as scorer:
            for at in missing:
                window = self.windows[at]
                if at < self._kept(scorer):
                    logits = np.concatenate([chunk.copy() for chunk in scorer.logits(window)])
                    _save(self._logits(at), logits)
                    _save(self._nll(at), rows.nll(Recorded(self.original.model, self._logits(at), scorer), window))
                else:
                    _save(self._nll(at), rows.nll(scorer, window))

    def _kept(self, scorer: Scorer) -> int:
        """How many windows' logits are kept."""
        each = 4 * scorer.executor.vocab_size * self._size
        return min(MOST_KEPT, max(1, KEPT_BYTES // each))

    def _nll(self, at: int) -> Path:
        return self.folder / f"nll-{at}.npy"

    def _logits(self, at: int) -> Path:
        return self.folder / f"logits-{at}.npy"


@dataclass(frozen=True)
class Recorded:
    """Logits of one window from a file, in the chunks that `beside` gives them in."""

    model: str
    file: Path
    beside: Scorer

    def logits(self, window: Window) -> Iterator[Logits]:
        """As `Scorer.logits`."""
        whole: Logits = np.load(self.file, mmap_mode="r")
        assert len(whole) == len(window.targets)
        size = self.beside.executor.shape.max_tokens
        at = 0
        for start in range(0, len(window.tokens) - 1, size):
            stop = min(start + size, len(window.tokens) - 1)
            rows = stop - max(start, window.first - 1)
            if rows > 0:
                yield whole[at : at + rows]
                at += rows


def _save(path: Path, values: Values | Logits) -> None:
    with atomic_file(path) as file:
        np.save(file, values)
