"""From a model, a recipe and statistics to solved layers, each written as soon as it is done.

From statistics of the original's activations layers do not depend on each other, and small ones are solved side by
side. Where the recipe propagates, or trains, they do: see `sequential`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from miaotui.compress.inputs import static_scales
from miaotui.compress.layers import read_layer
from miaotui.compress.parts import ends_part, kv_scales, layer_part
from miaotui.compress.places import Model
from miaotui.compress.precision import products
from miaotui.compress.progress import Clock, Tell, silent
from miaotui.compress.sequential import Sequential
from miaotui.compress.solve import round_layer, scale_layer
from miaotui.compress.solved import Solved, about, save
from miaotui.compress.statistics import attach
from miaotui.compress.work import Work

SIDE_BY_SIDE_BYTES = 1 << 28
"""Layers are solved side by side as long as their weights and moments together are within this."""


def walk(work: Work, tell: Tell = silent) -> Solved:
    """Solve every layer that is not solved yet, and the ends of the model."""
    work.folder.mkdir(parents=True, exist_ok=True)
    layers = len(work.model.spec.layers)
    clock = Clock(tell, "solve", layers)
    with products(work.precision) as product:
        if work.sequential:
            Sequential(work, product).run(clock)
        else:
            _side_by_side(work, clock)
        if about(work.folder, -1, work.belongs_to) is None:
            save(work.folder, ends_part(work), work.belongs_to)
    parts = [about(work.folder, index, work.belongs_to) for index in range(-1, layers)]
    known = [part for part in parts if part is not None]
    assert len(known) == layers + 1, "a layer was left out"
    return Solved(work.model.checkpoint, work.model.spec, work.model.names, work.recipe.kv_cache, work.folder, known)


# -- layers apart ------------------------------------------------------------------------------------------------
def _side_by_side(work: Work, clock: Clock) -> None:
    missing = unsolved(work)
    clock.kept(len(work.model.spec.layers) - len(missing))
    threads = torch.get_num_threads()
    workers, each = crew(work.model)
    if workers == 1:
        for index in missing:
            clock.step(solve_layer(work, index))
        return
    with ThreadPoolExecutor(workers, initializer=_start_worker, initargs=(each,)) as pool:
        jobs = [pool.submit(solve_layer, work, index) for index in missing]
        try:
            for job in as_completed(jobs):
                clock.step(job.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    torch.set_num_threads(threads)


def unsolved(work: Work) -> list[int]:
    """Layers that no run of the same work has written."""
    layers = range(len(work.model.spec.layers))
    return [index for index in layers if about(work.folder, index, work.belongs_to) is None]


def crew(model: Model) -> tuple[int, int]:
    """How many layers are solved side by side, and with how many threads each."""
    threads = torch.get_num_threads()
    workers = max(1, min(threads, SIDE_BY_SIDE_BYTES // _layer_bytes(model)))
    return workers, max(1, threads // workers)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def _layer_bytes(model: Model) -> int:
    """Bytes of a layer's weights and second moments in float32."""
    spec = model.spec
    attention = spec.layers[0].attention
    heads, width = attention.heads * attention.head_dim, spec.hidden_size
    inner = spec.intermediate_size
    experts = spec.layers[0].experts
    count = 1 if experts is None else experts.count
    inner = inner if experts is None else experts.width
    weights = width * (2 * heads + 2 * attention.kv_heads * attention.head_dim) + 3 * width * inner * count
    moments = 2 * width**2 + heads**2 + inner**2 * count
    return 4 * (weights + moments)


def solve_layer(work: Work, index: int) -> float:
    """Solve a layer from statistics, write it, and tell its error."""
    layer = read_layer(work.model, index, work.scheme_of)
    if work.statistics is not None:
        attach(layer, work.statistics.layer(index))
    if work.rotations is not None:
        work.rotations.layer(layer)
    scale_layer(work.model.spec, layer, work.steps)
    scales = static_scales(layer)
    kv = kv_scales(work, layer)
    part = layer_part(work, layer, round_layer(layer, work.steps), scales, kv)
    save(work.folder, part, work.belongs_to)
    return part.error
