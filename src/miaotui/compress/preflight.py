"""What the work will take, told before it begins: memory and disk by what must be held, time by trying one layer.

Where the statistics are there already, that layer is the first one itself, which is then done.
"""

from __future__ import annotations

import math
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from miaotui.compress.hidden import TOKENS_AT_ONCE
from miaotui.compress.layers import read_layer, run_layer
from miaotui.compress.options import steps_of
from miaotui.compress.places import Model
from miaotui.compress.precision import products
from miaotui.compress.recipe import Recipe, parse_scheme
from miaotui.compress.solve import round_layer, scale_layer
from miaotui.compress.statistics import Gathering, attach
from miaotui.compress.types import Place
from miaotui.compress.walk import SIDE_BY_SIDE_BYTES, crew, solve_layer, unsolved
from miaotui.compress.work import Work
from miaotui.errors import ResourceError
from miaotui.hardware.detect import available_memory
from miaotui.model.shapes import shapes
from miaotui.model.spec import ModelSpec

LIBRARIES = 350 << 20
"""What Python and PyTorch take."""
COPIES = 6
"""Of the largest weight and of its second moment, while GPTQ works on it."""
SLACK = 64 << 20
TRAINED = 4
"""Times a layer's weights and activations, while it is trained."""


@dataclass(frozen=True)
class Estimate:
    """memory: bytes at most; disk: bytes by folder (`cache`, `output`); seconds: None where nothing was tried."""

    memory: int
    disk: dict[str, int]
    seconds: float | None = None

    def sentence(self) -> str:
        """For people."""
        parts = [f"memory {_size(self.memory)}", f"disk {_size(sum(self.disk.values()))}"]
        if self.seconds is not None:
            parts.append(f"about {_duration(self.seconds)}")
        return ", ".join(parts)


def estimate(model: Model, recipe: Recipe, *, gathers: bool) -> Estimate:
    """By shapes alone. `gathers`: statistics are to be made (else they are there, or not needed)."""
    spec, calibration = model.spec, recipe.calibration
    by_layer: dict[int, int] = {}
    largest = widest = 0
    moments: dict[int, set[tuple[str, int]]] = {}
    for name, shape in shapes(spec, model.names):
        size = 4 * math.prod(shape)
        index = _layer(name)
        by_layer[index] = by_layer.get(index, 0) + size
        if index >= 0 and len(shape) > 1:
            largest, widest = max(largest, size), max(widest, shape[-1])
            moments.setdefault(index, set()).add((name.rpartition(".")[0].rpartition(".")[0], shape[-1]))
    layer = max((size for index, size in by_layer.items() if index >= 0), default=0)
    calibrated = recipe.calibrates
    moment = max((4 * sum(w * w for _, w in found) for found in moments.values()), default=0) if calibrated else 0
    table = 4 * spec.vocab_size * spec.hidden_size
    tables = 4 * table if recipe.embedding != "keep" or recipe.head != "keep" or "rotate" in recipe.steps else 0
    running = TOKENS_AT_ONCE * (4 * spec.hidden_size + 3 * spec.intermediate_size) * 4 if calibrated else 0
    solving = COPIES * (largest + (4 * widest**2 if calibrated else 0))
    side_by_side = SIDE_BY_SIDE_BYTES if layer + moment < SIDE_BY_SIDE_BYTES // 2 else 0
    memory = LIBRARIES + SLACK + max(layer + moment + max(running, solving) + side_by_side, tables)
    stream = 4 * calibration.windows * calibration.window * spec.hidden_size if calibrated else 0
    count = len(spec.layers)
    cache = count * moment // 2 + 2 * stream if gathers else 0
    weights = sum(size for index, size in by_layer.items() if index >= 0) // 4
    own = weights + (4 * stream if recipe.propagate or "qat" in recipe.steps else 0)
    if "scales" in recipe.steps:
        learnt, streams = _learnt(recipe, spec, weights), stream // calibration.windows
        scales = steps_of(recipe, spec).scales
        assert scales is not None
        training = 4 * learnt + TRAINED * (layer + running) + (count + 4) * scales.batch * streams + 2 * table
        memory = max(memory, LIBRARIES + SLACK + training)
        own += 3 * scales.windows * streams + 6 * learnt
    artefact = weights + 2 * table
    return Estimate(memory, {"cache": cache, "output": own + artefact})


def _learnt(recipe: Recipe, spec: ModelSpec, weights: int) -> int:
    """Bytes of what is multiplied onto the scales of so many weights, as float32."""
    scheme = parse_scheme(recipe.scheme).weights
    size = None if scheme is None else scheme.group_size
    return 4 * weights // (size or spec.hidden_size)


def _layer(name: str) -> int:
    """The layer that a tensor's name tells, or −1."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def refuse(found: Estimate, model: Model, cache: Path, out: Path) -> None:
    """Raise ResourceError where the work cannot end well, with what would help."""
    available = available_memory()
    if found.memory > available:
        raise ResourceError(
            f"Compressing {model.checkpoint.path.name} takes {_size(found.memory)} of memory, and"
            f" {_size(available)} is free.",
            "Use a machine with more, or the method rtn or hqq, which needs no second moments.",
        )
    for what, folder in (("cache", cache), ("output", out.parent)):
        free = shutil.disk_usage(_existing(folder)).free
        if found.disk[what] > free:
            remedy = "Set MIAOTUI_HOME to a larger disk" if what == "cache" else "Write to a larger disk"
            raise ResourceError(
                f"It takes {_size(found.disk[what])} of disk in {folder}, and {_size(free)} is free.", f"{remedy}."
            )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def measure(work: Work, found: Estimate, *, gathers: bool) -> Estimate:
    """The estimate with what one layer took: its time, and its memory where that is more."""
    begun = work.statistics is not None and not work.sequential and work.recipe.budget is None
    seconds = _first_layer(work) if begun else _try_layer(work, gathers=gathers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return Estimate(max(found.memory, peak), found.disk, seconds + _training(work))


def _first_layer(work: Work) -> float:
    """Solve the first layer that is left; the seconds of all others."""
    left = unsolved(work)
    if not left:
        return 0.0
    workers, each = crew(work.model)
    threads = torch.get_num_threads()
    torch.set_num_threads(each)
    started = time.perf_counter()
    with products(work.precision):
        solve_layer(work, left[0])
    torch.set_num_threads(threads)
    return (len(left) - 1) * (time.perf_counter() - started) / workers


def _try_layer(work: Work, *, gathers: bool) -> float:
    """Seconds of all layers, from one chunk of text through the first layer and the rounding of that."""
    spec, layers = work.model.spec, len(work.model.spec.layers)
    layer = read_layer(work.model, 0, work.scheme_of)
    with products(work.precision) as product:
        running = 0.0
        if work.text is not None:
            running = _try_text(work, product, gathers=gathers)
            chunk, gathering = _chunk(work), Gathering()
            run_layer(spec, layer, chunk, product=product, listen=gathering)
            attach(layer, gathering.finish("layer 0"))
        workers, each = (1, torch.get_num_threads()) if work.sequential else crew(work.model)
        threads = torch.get_num_threads()
        torch.set_num_threads(each)
        started = time.perf_counter()
        if work.rotations is None or not (work.steps.smooth or work.recipe.kv_cache != "none"):
            if work.rotations is not None:
                work.rotations.layer(layer)
            scale_layer(spec, layer, work.steps)
        round_layer(layer, work.steps)
        solving = (time.perf_counter() - started) / workers
        torch.set_num_threads(threads)
    return layers * (running + solving)


def _chunk(work: Work) -> torch.Tensor:
    """The stream before the first layer, of as many windows as go through a layer together."""
    assert work.text is not None
    length = work.text.tokens.shape[1]
    tokens = work.text.tokens[: max(1, TOKENS_AT_ONCE // length)]
    table = work.model.values(Place("embedding"))
    rows = torch.from_numpy(table.rows(tokens.ravel().astype("int64")).dense32()) * work.model.spec.embedding_scale
    return rows.view(*tokens.shape, -1)


def _try_text(work: Work, product: torch.dtype, *, gathers: bool) -> float:
    """Seconds of one layer over the whole text, as often as the recipe needs it."""
    once, chunk, chunks = _once(work, product)
    passes = (1.5 if gathers else 0.0) + (1.0 if work.sequential else 0.0) + (1.5 if work.recipe.propagate else 0.0)
    passes += 6.0 if work.staged else 0.0
    total = passes * chunks * once
    if work.steps.qat is not None:
        steps = work.steps.qat.steps * work.steps.qat.batch / chunk
        total += once * (3 * steps + chunks)
    return total


def _once(work: Work, product: torch.dtype) -> tuple[float, int, float]:
    """Seconds of one layer for a chunk of text, the chunk's windows, and how many chunks there are."""
    assert work.text is not None
    spec = work.model.spec
    layer, chunk = read_layer(work.model, 0, work.scheme_of), _chunk(work)
    run_layer(spec, layer, chunk, product=product)
    started = time.perf_counter()
    run_layer(spec, layer, chunk, product=product)
    return time.perf_counter() - started, len(chunk), len(work.text.tokens) / len(chunk)


def _training(work: Work) -> float:
    """Seconds that training through all layers takes: forward, again and backward, and the logits of both models."""
    if work.steps.scales is None:
        return 0.0
    with products(work.precision) as product:
        once, _, chunks = _once(work, product)
    text = work.text
    assert text is not None
    chunks *= work.steps.scales.windows / len(text.tokens)
    return len(work.model.spec.layers) * once * chunks * (1.5 + 5 * work.steps.scales.epochs)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
