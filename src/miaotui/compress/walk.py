"""From a model, a recipe and statistics to solved layers, one layer at a time, each written as soon as it is done.

From statistics of the original's activations layers do not depend on each other, and small ones are solved side by
side. Where the recipe propagates, or trains, the text goes through the layers as they are solved: the stream of the
quantised model lies in a file, and that of the original beside it where training needs it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from miaotui.compress import hidden as streams
from miaotui.compress.calibrate import FinalNorm, Statistics, embed
from miaotui.compress.data import CalibrationText
from miaotui.compress.hidden import Hidden
from miaotui.compress.inputs import input_changes, static_scales
from miaotui.compress.layers import read_layer, read_matrix, run_layer
from miaotui.compress.methods.fp8 import static_scale
from miaotui.compress.methods.grid import Quantised
from miaotui.compress.methods.qat import Start, Tuned, tune
from miaotui.compress.options import Steps, steps_of
from miaotui.compress.places import Model
from miaotui.compress.precision import products
from miaotui.compress.progress import Clock, Tell, silent
from miaotui.compress.recipe import Precision, Recipe, parse_scheme
from miaotui.compress.rotated import Rotations
from miaotui.compress.solve import Rounding, round_layer, scale_layer, solve_table
from miaotui.compress.solved import Part, Solved, about, save
from miaotui.compress.stages import Pass, round_in_stages
from miaotui.compress.statistics import Gathering, LayerStatistics
from miaotui.compress.types import Coded, InputStatistics, Layer, LinearScheme, Place
from miaotui.errors import UsageError
from miaotui.model.spec import ModelSpec
from miaotui.quant.rounding import bfloat16_bits, to_scale_type
from miaotui.quant.scheme import QuantScheme, ScaleType
from miaotui.quant.tensor import DenseTensor

LAYOUT = 2
"""Of what is solved by which arithmetic; part of what a part belongs to."""
PRE_NORMS = frozenset({"attention_norm", "mlp_norm"})
"""Trained together with the linears that read them."""
SIDE_BY_SIDE_BYTES = 1 << 28
"""Layers are solved side by side as long as their weights and moments together are within this."""


@dataclass(frozen=True, eq=False)
class Work:
    """Everything that decides the result, and where it goes. `schemes` are those that a budget chose."""

    model: Model
    recipe: Recipe
    folder: Path
    text: CalibrationText | None
    statistics: Statistics | None
    precision: Precision
    device: str = "cpu"
    schemes: Mapping[Place, LinearScheme] = field(default_factory=dict)

    @cached_property
    def steps(self) -> Steps:
        return steps_of(self.recipe, self.model.spec)

    @cached_property
    def rotations(self) -> Rotations | None:
        return None if self.steps.rotate is None else Rotations.of(self.model.spec, self.steps.rotate)

    @cached_property
    def scale_type(self) -> ScaleType:
        return scale_type_of(self.recipe, self.model)

    @cached_property
    def belongs_to(self) -> str:
        """The same for the same result."""
        text = None if self.text is None else self.text.fingerprint
        schemes = sorted((str(place), str(scheme)) for place, scheme in self.schemes.items())
        parts = [LAYOUT, self.model.checkpoint.fingerprint(), self.recipe.plain(), text, self.precision, schemes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def scheme_of(self, place: Place) -> LinearScheme:
        chosen = self.schemes.get(place)
        if chosen is not None:
            return chosen
        name = place.name(self.model.names).removesuffix(".weight")
        return self.recipe.scheme_of(name, self.scale_type)

    def table_scheme(self, role: str) -> LinearScheme:
        """Of the embedding or the head."""
        return parse_scheme(self.recipe.embedding if role == "embedding" else self.recipe.head, self.scale_type)

    @property
    def sequential(self) -> bool:
        """Whether a layer needs what the solved layers before it give."""
        return self.recipe.propagate or self.steps.qat is not None

    @property
    def staged(self) -> bool:
        """Whether a layer is rounded group by group, refitted to what the original gave."""
        return self.recipe.propagate and self.steps.rounder == "gptq" and self.steps.gptq.correct


def scale_type_of(recipe: Recipe, model: Model) -> ScaleType:
    """The type of scales: what the recipe says, else float16 for GGUF, else the model's own 16-bit type."""
    if recipe.scale_type != "auto":
        return recipe.scale_type
    config = model.checkpoint.config
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    return "float16" if recipe.format == "gguf" or own == "float16" else "bfloat16"


def walk(work: Work, tell: Tell = silent) -> Solved:
    """Solve every layer that is not solved yet, and the ends of the model."""
    work.folder.mkdir(parents=True, exist_ok=True)
    layers = len(work.model.spec.layers)
    clock = Clock(tell, "solve", layers)
    with products(work.precision) as product:
        if work.sequential:
            _Sequential(work, product).run(clock)
        else:
            _side_by_side(work, clock)
        if about(work.folder, -1, work.belongs_to) is None:
            save(work.folder, _ends(work), work.belongs_to)
    parts = [about(work.folder, index, work.belongs_to) for index in range(-1, layers)]
    known = [part for part in parts if part is not None]
    assert len(known) == layers + 1, "a layer was left out"
    return Solved(work.model.checkpoint, work.model.spec, work.model.names, work.recipe.kv_cache, work.folder, known)


def check_tables(recipe: Recipe, steps: Steps, spec: ModelSpec) -> None:
    """Raises UsageError for a head with a scheme of its own where it is the embedding."""
    rotated = steps.rotate is not None and steps.rotate.r1
    if spec.tied_head and not rotated and recipe.head not in ("keep", recipe.embedding):
        raise UsageError(
            "The head of this model is its embedding, so that both have one scheme.",
            f"Give embedding: {recipe.head} instead of head.",
        )


# -- layers apart ------------------------------------------------------------------------------------------------
def _side_by_side(work: Work, clock: Clock) -> None:
    layers = range(len(work.model.spec.layers))
    missing = [index for index in layers if about(work.folder, index, work.belongs_to) is None]
    clock.kept(len(layers) - len(missing))
    threads = torch.get_num_threads()
    workers, each = crew(work.model)
    if workers == 1:
        for index in missing:
            clock.step(_solve(work, index))
        return
    with ThreadPoolExecutor(workers, initializer=_start_worker, initargs=(each,)) as pool:
        jobs = [pool.submit(_solve, work, index) for index in missing]
        try:
            for job in as_completed(jobs):
                clock.step(job.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    torch.set_num_threads(threads)


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


def _solve(work: Work, index: int) -> float:
    """Solve a layer from statistics, write it, and tell its error."""
    layer = read_layer(work.model, index, work.scheme_of)
    if work.statistics is not None:
        attach(layer, work.statistics.layer(index))
    if work.rotations is not None:
        work.rotations.layer(layer)
    scale_layer(work.model.spec, layer, work.steps)
    scales = static_scales(layer)
    kv = _kv_scales(work, layer)
    part = _part(work, layer, round_layer(layer, work.steps), scales, kv)
    save(work.folder, part, work.belongs_to)
    return part.error


def attach(layer: Layer, found: LayerStatistics) -> None:
    """Give a layer's linears what calibration knows of them."""
    for key, group in layer.groups.items():
        group.statistics = found.inputs.get(key)
    layer.key_peaks, layer.value_peaks = found.keys, found.values


# -- layers one after the other --------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Sequential:
    work: Work
    product: torch.dtype

    def run(self, clock: Clock) -> None:
        work, layers = self.work, len(self.work.model.spec.layers)
        start = self._start()
        if start == 0:
            self._embed()
        clock.kept(start)
        for index in range(start, layers):
            clock.step(self._layer(index))
        if about(work.folder, -1, work.belongs_to) is None:
            save(work.folder, _ends(work, self._head_statistics()), work.belongs_to)
        for name in self._names:
            streams.drop_others(work.folder, name)

    @property
    def _names(self) -> tuple[str, ...]:
        """The streams that are kept: of the solved layers, and of the original."""
        return ("solved", "target") if self.work.steps.qat is not None or self.work.staged else ("solved",)

    def _stream(self, name: str, index: int) -> Hidden:
        assert self.work.text is not None, "nothing to propagate"
        windows, length = self.work.text.tokens.shape
        return streams.at(self.work.folder, name, index, (windows, length, self.work.model.spec.hidden_size))

    def _start(self) -> int:
        layers = len(self.work.model.spec.layers)
        if about(self.work.folder, -1, self.work.belongs_to) is not None:
            return layers
        for index in range(layers, 0, -1):
            part = about(self.work.folder, index - 1, self.work.belongs_to)
            if part is not None and part.streams == self._marks(index):
                return index
        return 0

    def _marks(self, index: int) -> dict[str, str]:
        return {name: self._stream(name, index).mark() or "" for name in self._names}

    def _embed(self) -> None:
        work = self.work
        assert work.text is not None
        turn = None if work.rotations is None else work.rotations.r1
        for name in self._names:
            embed(work.model, work.text, self._stream(name, 0), turn)

    def _layer(self, index: int) -> float:
        work, spec = self.work, self.work.model.spec
        layer = read_layer(work.model, index, work.scheme_of)
        if work.rotations is not None:
            work.rotations.layer(layer)
        before = self._stream("solved", index)
        if work.recipe.propagate:
            attach(layer, self._gather(layer, before))
        elif work.statistics is not None:
            self._attach_original(layer, index)
        scale_layer(spec, layer, work.steps)
        scales, kv = static_scales(layer), _kv_scales(work, layer)
        if "target" in self._names:
            self._pass(layer, "target", index)
        rounded = self._round(layer, index, scales)
        if work.steps.qat is not None:
            _apply(layer, rounded, self._tune(layer, rounded, index, scales))
        self._pass(layer, "solved", index, scales)
        part = _part(work, layer, rounded, scales, kv)
        part.streams = self._marks(index + 1)
        save(work.folder, part, work.belongs_to)
        for name in self._names:
            streams.drop_others(work.folder, name, frozenset({index + 1}))
        return part.error

    def _round(self, layer: Layer, index: int, scales: dict[Place, float]) -> dict[str, Rounding]:
        work = self.work
        if not work.staged:
            return round_layer(layer, work.steps)
        original, solved = self._stream("target", index), self._stream("solved", index)
        way = Pass(work.model.spec, original, solved, self.product, input_changes(layer, scales))
        return round_in_stages(layer, work.steps, way)

    def _attach_original(self, layer: Layer, index: int) -> None:
        """Statistics of the original, rotated as the layer already is: on a copy that has them from the start."""
        work = self.work
        assert work.statistics is not None
        found = work.statistics.layer(index)
        if work.rotations is None:
            attach(layer, found)
            return
        again = read_layer(work.model, index, work.scheme_of)
        attach(again, found)
        work.rotations.layer(again)
        for key, group in layer.groups.items():
            group.statistics = again.groups[key].statistics

    def _gather(self, layer: Layer, before: Hidden) -> LayerStatistics:
        gathering = Gathering()
        for chosen in before.chunks():
            run_layer(self.work.model.spec, layer, before.read(chosen), product=self.product, listen=gathering)
        return gathering.finish(f"layer {layer.index}")

    def _pass(self, layer: Layer, name: str, index: int, scales: dict[Place, float] | None = None) -> None:
        """A stream through a layer; `scales` are given where its inputs are to be coded."""
        inputs = None if scales is None else input_changes(layer, scales)
        spec, product = self.work.model.spec, self.product
        self._stream(name, index).map(
            self._stream(name, index + 1), lambda x: run_layer(spec, layer, x, product=product, inputs=inputs)
        )

    def _tune(self, layer: Layer, rounded: Mapping[str, Rounding], index: int, scales: dict[Place, float]) -> Tuned:
        """Train a layer's codes against what the original gives."""
        work = self.work
        assert work.steps.qat is not None
        starts = {
            f"{key}:{i}": Start.of(rounding.exact[i], one.tensor, _weights(group.schemes[i]))
            for key, group in layer.groups.items()
            for rounding in (rounded[key],)
            for i, one in enumerate(rounding.rounded)
            if isinstance(one, Quantised)
        }
        norms: dict[str, torch.Tensor] = {name: layer.norms[name] for name in layer.norms if name in PRE_NORMS}
        inputs = input_changes(layer, scales)

        def run(values: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            changed = _with(layer, values)
            return run_layer(work.model.spec, changed, x, product=self.product, inputs=inputs)

        with torch.enable_grad():
            return tune(
                starts,
                norms,
                self._stream("solved", index).all(),
                self._stream("target", index + 1).all(),
                run,
                work.steps.qat,
                seed=work.recipe.calibration.seed + index,
            )

    def _head_statistics(self) -> InputStatistics:
        """Of what the head is given after all solved layers."""
        work, gathering = self.work, Gathering()
        last, norm = self._stream("solved", len(work.model.spec.layers)), FinalNorm(work.model)
        rotated = work.rotations is not None and work.rotations.r1 is not None
        for chosen in last.chunks():
            gathering("head", norm(last.read(chosen), plain=rotated).flatten(0, 1))
        return gathering.finish("the last norm").inputs["head"]


def _weights(scheme: LinearScheme) -> QuantScheme:
    assert scheme.weights is not None
    return scheme.weights


def _with(layer: Layer, values: Mapping[str, torch.Tensor]) -> Layer:
    """The layer with weights (`qkv:0`) and norms that are trained."""
    groups = {
        key: replace(group, weights=[values.get(f"{key}:{i}", weight) for i, weight in enumerate(group.weights)])
        for key, group in layer.groups.items()
    }
    return replace(layer, groups=groups, norms={name: values.get(name, norm) for name, norm in layer.norms.items()})


def _apply(layer: Layer, rounded: Mapping[str, Rounding], tuned: Tuned) -> None:
    """Put what training found into the layer."""
    for name, one in tuned.weights.items():
        key, _, i = name.rpartition(":")
        found = layer.groups[key].statistics
        exact = rounded[key].exact[int(i)]
        rounded[key].rounded[int(i)] = one if found is None else one.judged(exact, found.moment)
        layer.groups[key].weights[int(i)] = one.values
    for name, norm in tuned.norms.items():
        layer.norms[name] = norm
        layer.changed.add(Place(name, layer.index))


# -- what is written ---------------------------------------------------------------------------------------------------
def _kv_scales(work: Work, layer: Layer) -> tuple[float, float] | None:
    kind = work.recipe.kv_cache
    if kind == "none":
        return None
    assert layer.key_peaks is not None, "the cache was not measured"
    assert layer.value_peaks is not None
    return static_scale(layer.key_peaks, kind), static_scale(layer.value_peaks, kind)


def _part(
    work: Work,
    layer: Layer,
    rounded: Mapping[str, Rounding],
    scales: dict[Place, float],
    kv: tuple[float, float] | None,
) -> Part:
    """A solved layer as it is written: codes, and everything else that changed."""
    part = Part(layer.index, input_scales=scales, kv_scales=kv)
    for key, group in layer.groups.items():
        for i, place in enumerate(group.places):
            part.schemes[place] = group.schemes[i]
            one = rounded[key].rounded[i]
            if one is not None:
                part.tensors[place] = one.tensor
            elif not np.array_equal(group.weights[i].numpy(), work.model.values(place).dense32()):
                part.tensors[place] = dense(group.weights[i], work.scale_type)
            bias = replace(place, bias=True)
            if group.biases is not None and bias in layer.changed:
                part.tensors[bias] = dense(group.biases[i], "float32")
        if any(one is not None for one in rounded[key].rounded):
            part.errors[key] = rounded[key].error
    for place in layer.changed:
        if place.role == "router":
            assert layer.router is not None
            part.tensors[place] = dense(layer.router, "float32")
        elif place.role in layer.norms:
            part.tensors[place] = dense((layer.norm_biases if place.bias else layer.norms)[place.role], "float32")
    return part


def _ends(work: Work, statistics: InputStatistics | None = None) -> Part:
    """The embedding, the last norm and the head, as far as anything becomes of them."""
    model, part, turned = work.model, Part(-1), work.rotations is not None and work.rotations.r1 is not None
    embedding, head = work.table_scheme("embedding"), work.table_scheme("head")
    if turned or not embedding.kept:
        table = read_matrix(model, "embedding")
        table = table if work.rotations is None else work.rotations.embedding(table)
        _end(work, part, Place("embedding"), table, embedding, None)
        del table
    if not turned and (model.spec.tied_head or head.kept):
        return part
    weight = read_matrix(model, "head")
    known = statistics
    if known is None and work.statistics is not None and not head.kept:
        known = work.statistics.head()
        if turned and work.rotations is not None:
            known = work.rotations.head_statistics(known, _last_norm(model))
    if turned and work.rotations is not None:
        gamma = _last_norm(model)
        weight = work.rotations.head(weight, gamma)
        part.tensors[Place("norm")] = dense(torch.ones_like(gamma), "float32")
    _end(work, part, Place("head"), weight, head, known)
    return part


def _end(
    work: Work, part: Part, place: Place, table: torch.Tensor, scheme: LinearScheme, found: InputStatistics | None
) -> None:
    part.schemes[place] = scheme
    if scheme.kept:
        part.tensors[place] = dense(table, work.scale_type)
        return
    one = solve_table(table, scheme, found, work.steps)
    part.tensors[place] = one.tensor
    part.errors[place.role] = one.error


def _last_norm(model: Model) -> torch.Tensor:
    return torch.from_numpy(np.array(model.values(Place("norm")).dense32()))


def dense(values: torch.Tensor, kind: ScaleType) -> Coded:
    """A tensor that is not coded, rounded to a type."""
    array = np.ascontiguousarray(values.numpy(), np.float32)
    if kind == "bfloat16":
        return DenseTensor(kind, bfloat16_bits(array))
    return DenseTensor(kind, to_scale_type(array, kind).astype(np.float16) if kind == "float16" else array)
