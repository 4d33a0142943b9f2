"""A layer rounded group by group, each for the inputs that it will have once all before it are rounded.

The text goes through the original's layer and through the one that is being rounded, side by side; each group's weights
are refitted to what the original gave (`methods.correct`) before they are rounded. Memory: a few windows, and of one
group the second moments of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from miaotui.compress.hidden import Hidden
from miaotui.compress.inputs import Change
from miaotui.compress.layers import run_layer
from miaotui.compress.methods.correct import corrected
from miaotui.compress.options import Steps
from miaotui.compress.solve import Rounding, round_group
from miaotui.compress.types import Layer, LinearGroup
from miaotui.model.spec import ModelSpec

STAGES = ("qkv", "out", "mlp_in", "mlp_out")
"""In the order of the forward pass. Experts are not among them: their tokens are not the same in both."""


@dataclass(frozen=True, eq=False)
class Pass:
    """How the text goes through: the residual streams before the layer, the original's and the solved one's.

    inputs: what becomes of the inputs of the solved layer's linears.
    """

    spec: ModelSpec
    original: Hidden
    solved: Hidden
    product: torch.dtype
    inputs: Mapping[str, Change]


def round_in_stages(layer: Layer, steps: Steps, way: Pass) -> dict[str, Rounding]:
    """Codes for every group, as `solve.round_layer`; the groups' statistics are replaced by those that they then have.

    `layer` is exact, its transformations done.
    """
    exact = replace(layer, groups={key: replace(g, weights=list(g.weights)) for key, g in layer.groups.items()})
    rounded: dict[str, Rounding] = {}
    staged = [key for key in STAGES if key in layer.groups]
    for key in (*staged, *(key for key in layer.groups if key not in staged)):
        group = layer.groups[key]
        if key in staged and group.statistics is not None and not all(scheme.kept for scheme in group.schemes):
            _refit(group, _sums(exact, layer, key, way), steps.gptq.damping)
        rounded[key] = round_group(group, steps)
    return rounded


class _Sums:
    """Over tokens, with inputs in rows: X̃ᵀX̃, XᵀX̃ and EᵀX̃, see `methods.correct`."""

    def __init__(self) -> None:
        self.moment = self.cross = torch.zeros(())
        self.lack: torch.Tensor | None = None

    def add(self, x: torch.Tensor, now: torch.Tensor, lack: torch.Tensor | None) -> None:
        self.moment = self.moment + now.T @ now
        self.cross = self.cross + x.T @ now
        if lack is not None:
            of_chunk = lack.T @ now
            self.lack = of_chunk if self.lack is None else self.lack + of_chunk


def _refit(group: LinearGroup, sums: _Sums, damping: float) -> None:
    """Kept weights are not touched: what they lack, those after them may make good."""
    assert group.statistics is not None
    group.statistics = replace(group.statistics, moment=sums.moment)
    group.weights = [
        weight if scheme.kept else corrected(weight, sums.moment, sums.cross, damping, lack=sums.lack)
        for weight, scheme in zip(group.weights, group.schemes, strict=True)
    ]


def _sums(exact: Layer, layer: Layer, key: str, way: Pass) -> _Sums:
    sums = _Sums()
    for chosen in way.solved.chunks():
        before, now = way.original.read(chosen), way.solved.read(chosen)
        heard = _hear(way, exact, before, key, {})
        heard_now = _hear(way, layer, now, key, way.inputs)
        coded = way.inputs[key](heard_now[key]) if key in way.inputs else heard_now[key]
        sums.add(heard[key], coded, _lack(way.spec, exact, layer, key, (before, now), (heard, heard_now)))
    return sums


class _Enough(Exception):
    """No error, but the way out of a forward pass."""


def _hear(
    way: Pass, layer: Layer, hidden: torch.Tensor, key: str, inputs: Mapping[str, Change]
) -> dict[str, torch.Tensor]:
    """The inputs `[rows, in]` of the linears of that key, and of `out` where that comes before; the pass ends there."""
    heard: dict[str, torch.Tensor] = {}

    def listen(name: str, x: torch.Tensor) -> None:
        if name in ("out", key):
            heard[name] = x
        if name == key:
            raise _Enough

    try:
        run_layer(way.spec, layer, hidden, product=way.product, listen=listen, inputs=inputs)
    except _Enough:
        return heard
    raise AssertionError(f"no linear {key} in layer {layer.index}")


def _lack(
    spec: ModelSpec,
    exact: Layer,
    layer: Layer,
    key: str,
    streams: tuple[torch.Tensor, torch.Tensor],
    heard: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> torch.Tensor | None:
    """What a linear that adds to the residual stream should make good there, `[rows, hidden]`: the original's stream
    less the solved one's. None for other linears, and where a norm stands between the linear and the stream.
    """
    before, now = (stream.flatten(0, 1) for stream in streams)
    if key not in ("out", "mlp_out") or "attention_post_norm" in layer.norms or "mlp_post_norm" in layer.norms:
        return None
    if key == "mlp_out":
        before = before + spec.residual_scale * _output(exact, heard[0]["out"])
        now = now + spec.residual_scale * _output(layer, heard[1]["out"])
    return (before - now) / spec.residual_scale


def _output(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """What the attention adds to the stream."""
    group = layer.groups["out"]
    y = x @ group.weights[0].T
    return y if group.biases is None else y + group.biases[0]
