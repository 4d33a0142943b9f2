"""Calibrate once: what the original's linears are given, by layer, in files that every method and trial reads.

The text goes through the original layer by layer; memory holds one layer, its sums and a few windows. A layer's file is
written when the stream after it is, so that a run that was killed goes on with the layer that it was at.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from miaotui.checkpoint.write import atomic_file
from miaotui.compress import hidden as streams
from miaotui.compress.hidden import Hidden
from miaotui.compress.layers import read_layer, run_layer
from miaotui.compress.places import Model
from miaotui.compress.precision import products
from miaotui.compress.progress import Clock, Progress, Tell, silent
from miaotui.compress.recipe import Precision
from miaotui.compress.statistics import Gathering, LayerStatistics, load, save
from miaotui.compress.text.data import CalibrationText
from miaotui.compress.types import InputStatistics, Place
from miaotui.compress.windows import WindowOps
from miaotui.model.spec import ModelSpec

LAYOUT = 1
"""Of the files; part of what names them."""
KEPT_BYTES = 40 << 30
"""Of all statistics together: those not used for longest are removed."""


@dataclass(frozen=True)
class Statistics:
    """The files of one model, text and setting."""

    folder: Path
    layers: int

    def layer(self, index: int) -> LayerStatistics:
        return load(_path(self.folder, index))

    def head(self) -> InputStatistics:
        """Of what the head is given: the last norm's output."""
        return load(_path(self.folder, self.layers)).inputs["head"]


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


def key_of(model: Model, text: CalibrationText, precision: Precision) -> str:
    """Names the statistics: the same for the same model, tokens and arithmetic."""
    parts = [LAYOUT, model.checkpoint.fingerprint(), text.fingerprint, list(text.tokens.shape), precision]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def kept(model: Model, text: CalibrationText, cache: Path, *, precision: Precision) -> Statistics | None:
    """Those that lie in `cache`, whole."""
    folder, layers = cache / key_of(model, text, precision), len(model.spec.layers)
    return Statistics(folder, layers) if _path(folder, layers).exists() else None


def calibrate(
    model: Model,
    text: CalibrationText,
    cache: Path,
    *,
    precision: Precision,
    device: str = "cpu",
    tell: Tell = silent,
) -> Statistics:
    """Statistics of every layer, from `cache` where they are. `precision` is fp32 or bf16.

    Disk: the upper triangle of each linear's XᵀX (4 · in² / 2 bytes), and while it runs the streams before and after
    a layer. Raises UsageError where activations are not finite.
    """
    folder = cache / key_of(model, text, precision)
    folder.mkdir(parents=True, exist_ok=True)
    layers = len(model.spec.layers)
    with _alone(folder, tell), products(precision) as product:
        clock = Clock(tell, "calibrate", layers)
        if not _path(folder, layers).exists():
            _Walk(model, text, folder, product, device).run(clock)
        else:
            clock.kept(layers)
        streams.drop_others(folder, "hidden")
    _touch(folder, model, text)
    _make_room(cache, folder)
    return Statistics(folder, layers)


@dataclass(frozen=True, eq=False)
class _Walk:
    model: Model
    text: CalibrationText
    folder: Path
    product: torch.dtype
    device: str

    def run(self, clock: Clock) -> None:
        layers = len(self.model.spec.layers)
        start = self._start()
        if start == 0:
            embed(self.model, self.text, self._stream(0))
        clock.kept(start)
        for index in range(start, layers):
            self._layer(index)
            clock.step()
        self._head(layers)

    def _start(self) -> int:
        """The first layer to do: the one whose stream is there and as its file says."""
        for index in range(len(self.model.spec.layers), 0, -1):
            path = _path(self.folder, index - 1)
            if not path.exists():
                continue
            mark = self._stream(index).mark()
            if mark is not None and mark == load(path).stream:
                return index
        return 0

    def _layer(self, index: int) -> None:
        spec, gathering = self.model.spec, Gathering()
        layer = read_layer(self.model, index, device=self.device)

        def step(before: torch.Tensor) -> torch.Tensor:
            before = before.to(self.device)
            after = run_layer(spec, layer, before, product=self.product, listen=gathering)
            gathering.moved(before, after)
            return after

        self._stream(index).map(self._stream(index + 1), step)
        found = gathering.finish(f"layer {index}")
        found.stream = self._stream(index + 1).mark() or ""
        save(_path(self.folder, index), found)
        streams.drop_others(self.folder, "hidden", frozenset({index + 1}))

    def _head(self, layers: int) -> None:
        gathering, last = Gathering(), self._stream(layers)
        norm = FinalNorm(self.model)
        for chosen in last.chunks():
            gathering("head", norm(last.read(chosen)).flatten(0, 1))
        save(_path(self.folder, layers), gathering.finish("the last norm"))

    def _stream(self, index: int) -> Hidden:
        shape = (*self.text.tokens.shape, self.model.spec.hidden_size)
        return streams.at(self.folder, "hidden", index, shape)


# -- the ends of a model -------------------------------------------------------------------------------------------
def embed(model: Model, text: CalibrationText, to: Hidden, turn: torch.Tensor | None = None) -> None:
    """The stream before the first layer, turned by a rotation `[hidden, hidden]`, if any. Only rows that occur are
    read.
    """
    table = model.values(Place("embedding"))
    to.create()
    for chosen in to.chunks():
        ids = text.tokens[chosen]
        known, index = torch.unique(torch.from_numpy(ids).long(), return_inverse=True)
        rows = torch.from_numpy(table.rows(known.numpy()).dense32()) * model.spec.embedding_scale
        rows = rows if turn is None else rows @ turn
        to.write(chosen, rows[index])


class FinalNorm:
    """The last norm of a model, on `[…, hidden]`; `plain`: without its weight, as a rotated model has it."""

    def __init__(self, model: Model) -> None:
        spec: ModelSpec = model.spec
        place, bias = Place("norm"), Place("norm", bias=True)
        offset = model.values(bias).dense32() if bias.name(model.names) in model.present else None
        self._ops = WindowOps(1)
        self.weight = self._ops.prepare_norm(
            model.values(place).dense32(), spec.norm_eps, bias=offset, kind=spec.norm_kind
        )

    def __call__(self, hidden: torch.Tensor, *, plain: bool = False) -> torch.Tensor:
        weight = replace(self.weight, weight=torch.ones_like(self.weight.weight)) if plain else self.weight
        return self._ops.norm(hidden, weight)


# -- the cache -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _alone(folder: Path, tell: Tell) -> Iterator[None]:
    """One process at a time works on the same statistics; another waits and then finds them."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(Progress("calibrate", 0, 0, note="Another process is calibrating the same: waiting for it."))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _touch(folder: Path, model: Model, text: CalibrationText) -> None:
    """Says for people what the folder is of, and that it was used now."""
    about = {"model": str(model.checkpoint.path), "text": text.report()}
    with atomic_file(folder / "about.json") as file:
        file.write(json.dumps(about, indent=2, ensure_ascii=False).encode())


def _make_room(cache: Path, used: Path) -> None:
    """Remove what was not used for longest, until the rest is within KEPT_BYTES; never what is in use."""
    found = sorted((p for p in cache.iterdir() if p.is_dir()), key=lambda p: -p.stat().st_mtime)
    total = 0
    for folder in found:
        total += sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        if total > KEPT_BYTES and folder != used and not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    try:
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
