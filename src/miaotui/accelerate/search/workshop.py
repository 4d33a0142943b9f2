"""The real workshop: builds with `compress`, scores and times through the engine that will serve what was built.

Everything that it makes lies in one folder beside the output, from which a search that was killed goes on. At most
two models are in memory at once: a candidate, and the original or another candidate beside it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from miaotui.accelerate.goals import Workload
from miaotui.accelerate.search.attempt import Plan
from miaotui.accelerate.search.duel import Duellist, Side
from miaotui.accelerate.search.judge import Judge
from miaotui.accelerate.search.space import ORIGINAL, Candidate, Serving
from miaotui.accelerate.search.trial import Built, Confirmation, Duel, Scores
from miaotui.accelerate.texts import Texts
from miaotui.compress.progress import Progress
from miaotui.compress.recipe import Recipe
from miaotui.measure import quality
from miaotui.measure.quality_data import Cut as Windows
from miaotui.measure.quality_data import cut_windows, read_data
from miaotui.measure.scoring import Opened, Settings

if TYPE_CHECKING:
    from miaotui.compress.text.packing import Write

WINDOW, SHORT_WINDOW, MOST_WINDOWS = 512, 256, 64
"""Of the text that is chosen by; shorter ones in budgets of less than `LONG_BUDGET` seconds."""
LONG_BUDGET = 240.0
LAST_WINDOW, LEAST_LAST, MOST_LAST = 1024, 8, 64
"""Of the text that confirms."""
LAST_ROUNDS = 9
LAST_SHARE = 0.12
"""Of the budget, for the text that confirms."""

KEPT_ARTEFACTS, LEAST_BOUND = 2, 8 << 30
"""Artefacts that lie there may take as much as so many originals, or so many bytes, whichever is more."""

Build = Callable[[Candidate, Path], tuple[str, ...]]
"""Writes a candidate's weights to a path, and gives what is to be said about them."""


@dataclass(frozen=True)
class Subject:
    """The original as the workshop needs it: its name, and texts that are cut by its tokenizer."""

    model: str
    opened: Opened
    texts: Texts


class RealWorkshop:
    """Owns `folder`. `rest` frees every model in memory."""

    def __init__(self, subject: Subject, plan: Plan, load: Workload, folder: Path, build: Build) -> None:
        """Raises UsageError where the text is too short to choose and to confirm by."""
        self._subject, self._plan, self._folder, self._build = subject, plan, folder, build
        opened = subject.opened
        most = opened_length(opened)
        choose = read_data(str(subject.texts.choose))
        size = WINDOW if plan.budget >= LONG_BUDGET else SHORT_WINDOW
        cut = Windows(min(size, most), None, MOST_WINDOWS)
        windows, _ = cut_windows(choose, cut, opened.tokenizer, opened.render)
        self._last = Windows(min(LAST_WINDOW, most))
        self._judge = Judge(opened, windows, folder / "original")
        self.tokens = np.concatenate([window.tokens for window in windows])
        """Of the text that is chosen by."""
        self._duellist = Duellist(plan.goal, load, self.tokens.tolist(), plan.seed)
        self.windows = len(windows)
        self._pace: float | None = None
        """Tokens a second of the original and a candidate together, once that is known."""

    # -- the search's questions --------------------------------------------------------------------------
    def build(self, candidate: Candidate) -> Built:
        self.rest()
        path = self.path(candidate)
        notes: tuple[str, ...] = ()
        if not path.exists():
            self._make_room()
            path.parent.mkdir(parents=True, exist_ok=True)
            notes = self._build(candidate, path)
        return Built(size_of(path), notes)

    def score(self, candidate: Candidate, windows: range) -> Scores:
        self._duellist.rest()
        started = time.perf_counter()
        found = self._judge.scores(self._model(candidate), settings_of(candidate.serving), windows)
        self._pace = sum(found.tokens) / max(1e-9, time.perf_counter() - started)
        return found

    def duel(self, candidate: Candidate, rounds: int, rival: Candidate = ORIGINAL) -> Duel:
        self._judge.rest()
        return self._duellist.fight(self._side(rival), self._side(candidate), rounds)

    def confirm(self, candidate: Candidate) -> Confirmation:
        self.rest()
        report = quality.evaluate(
            self._model(candidate),
            str(self._subject.texts.confirm),
            cut=Windows(self._last.size, None, self._windows_to_confirm()),
            settings=settings_of(candidate.serving),
            reference=quality.Reference(self._subject.model, quality.EXACT),
        )
        return Confirmation(report, self.duel(candidate, LAST_ROUNDS))

    # -- around it ---------------------------------------------------------------------------------------
    def path(self, candidate: Candidate) -> Path:
        """Where a candidate's weights are: a folder, with a GGUF file in it for that format."""
        recipe = candidate.recipe
        assert recipe is not None
        folder = self._folder / "built" / candidate.weights_key
        return folder / "model.gguf" if recipe.format == "gguf" else folder

    def rest(self) -> None:
        self._judge.rest()
        self._duellist.rest()

    def _side(self, candidate: Candidate) -> Side:
        return Side(self._model(candidate), candidate.serving)

    def _model(self, candidate: Candidate) -> str:
        """The name or path to load; built again where a search was killed after it had been cleared away."""
        if candidate.recipe is None:
            return self._subject.model
        path = self.path(candidate)
        if not path.exists():
            self.build(candidate)
        os.utime(path)
        return str(path)

    def _make_room(self) -> None:
        """Clear away what was not used for the longest; what is asked for after all is built anew."""
        bound = max(KEPT_ARTEFACTS * self._subject.opened.checkpoint.nbytes, LEAST_BOUND)
        folder = self._folder / "built"
        found = sorted(folder.iterdir(), key=_last_use) if folder.is_dir() else []
        while found and sum(size_of(path) for path in found) > bound:
            shutil.rmtree(found.pop(0))

    def _windows_to_confirm(self) -> int:
        """As many as there is time for."""
        if self._pace is None:
            return LEAST_LAST
        fitting = int(LAST_SHARE * self._plan.budget * self._pace / 2 / self._last.size)
        return min(MOST_LAST, max(LEAST_LAST, fitting))


def settings_of(serving: Serving) -> Settings:
    """What of the serving changes answers, and the threads."""
    return Settings(compute=serving.compute, kv_cache_dtype=serving.kv_cache_dtype, threads=serving.threads)


def opened_length(opened: Opened) -> int:
    """Positions that the model was made for."""
    from miaotui.model.families import read_spec

    return read_spec(opened.checkpoint)[0].max_position


def _last_use(built: Path) -> float:
    return max((path.stat().st_mtime for path in (built, *built.glob("*.gguf"))), default=0.0)


def size_of(path: Path) -> int:
    """Bytes of an artefact's weights."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".safetensors", ".gguf")]
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Builder:
    """Builds by `compress`, of a model from which layers were cut where the candidate wants that.

    `write` is the model's own text, for calibration by `self`. A cut model lies in `folder` until all is over.
    """

    model: str
    folder: Path
    tell: Callable[[str], None]
    write: Write | None = None

    def __call__(self, candidate: Candidate, out: Path) -> tuple[str, ...]:
        from miaotui.compress.run import compress

        assert candidate.recipe is not None
        source = self.model if candidate.blocks is None else self._cut(candidate.recipe, candidate.blocks)
        report = compress(source, candidate.recipe, out, write=self.write, tell=self._told)
        return notes_of(report.errors)

    def _cut(self, recipe: Recipe, blocks: int) -> str:
        """The model with so many layers left, written once."""
        from miaotui.compress.pruning.run import Cut, PruneSettings, prune

        path = self.folder / f"{blocks}-layers"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            settings = PruneSettings(cut=Cut(blocks=str(blocks)), calibration=recipe.calibration)
            prune(self.model, settings, path)
        return str(path)

    def _told(self, progress: Progress) -> None:
        self.tell(f"{progress.stage} {progress.done}/{progress.total}")


def notes_of(errors: Mapping[int, Mapping[str, float]]) -> tuple[str, ...]:
    """The linear that was hit hardest, in a sentence."""
    every = [(error, layer, name) for layer, found in errors.items() for name, error in found.items()]
    if not every:
        return ()
    error, layer, name = max(every)
    where = "the tables" if layer < 0 else f"{name} of layer {layer}"
    return (f"The largest error of a linear's outputs is {error:.2%}, in {where}.",)
