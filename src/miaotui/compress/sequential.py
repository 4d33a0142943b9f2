"""Layers that are solved one after the other, while the text goes through them.

The stream of the solved model lies in a file, and that of the original beside it where a layer is refitted or trained
towards it. A layer's file has the marks of both, so that a run that was killed goes on after the last whole layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from miaotui.compress import hidden as streams
from miaotui.compress.calibrate import FinalNorm, embed
from miaotui.compress.hidden import Hidden
from miaotui.compress.inputs import input_changes, static_scales
from miaotui.compress.layers import read_layer, run_layer
from miaotui.compress.methods.grid import Quantised
from miaotui.compress.methods.qat import Start, Tuned, tune
from miaotui.compress.parts import ends_part, kv_scales, layer_part
from miaotui.compress.progress import Clock
from miaotui.compress.solve import Rounding, round_layer, scale_layer
from miaotui.compress.solved import about, save
from miaotui.compress.stages import Pass, round_in_stages
from miaotui.compress.statistics import Gathering, LayerStatistics, attach
from miaotui.compress.types import InputStatistics, Layer, LinearScheme, Place
from miaotui.compress.work import Work
from miaotui.quant.scheme import QuantScheme

PRE_NORMS = frozenset({"attention_norm", "mlp_norm"})
"""Trained together with the linears that read them."""


@dataclass(frozen=True, eq=False)
class Sequential:
    """Layers one after the other: each is given what the solved ones before it make of the text."""

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
            save(work.folder, ends_part(work, self._head_statistics()), work.belongs_to)
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
        scales, kv = static_scales(layer), kv_scales(work, layer)
        if "target" in self._names:
            self._pass(layer, "target", index)
        rounded = self._round(layer, index, scales)
        if work.steps.qat is not None:
            _apply(layer, rounded, self._tune(layer, rounded, index, scales))
        self._pass(layer, "solved", index, scales)
        part = layer_part(work, layer, rounded, scales, kv)
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
