"""A smaller dense model out of a larger one: whole blocks, groups of heads, channels and hidden dimensions cut out.

What is left is an ordinary model of the same family with smaller numbers in its config.json, that any runtime loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from miaotui.compress.methods import structured
from miaotui.compress.types import InputStatistics, Layer, LinearGroup
from miaotui.errors import MiaotuiError, UnsupportedModelError, UsageError
from miaotui.model.families import spec_of_config
from miaotui.model.spec import LayerSpec, ModelSpec

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers")
"""Keys of config.json that tell one layer from another; the last has their numbers, the others an entry for each."""

SCALES = ("embedding_scale", "residual_scale", "logits_scale", "logits_softcap", "norm_eps")

Statistics = Mapping[str, InputStatistics]
"""Of one layer's linears, by their role."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """How large the model is to be. Where nothing is cut, as large as it was."""

    layers: int
    groups: int
    channels: int
    hidden: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Sizes:
        return cls(len(spec.layers), spec.layers[0].attention.kv_heads, spec.intermediate_size, spec.hidden_size)


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays: layers by their old numbers; of each, groups of heads and channels; hidden dimensions of all.

    None (or a layer that is missing): all.
    """

    layers: tuple[int, ...]
    groups: Mapping[int, torch.Tensor]
    channels: Mapping[int, torch.Tensor]
    hidden: torch.Tensor | None = None


def check_sizes(spec: ModelSpec, sizes: Sizes) -> None:
    """Raises UsageError for sizes that leave nothing, UnsupportedModelError for families that cannot be cut so."""
    whole = Sizes.of(spec)
    for what, left, had in (
        ("blocks", sizes.layers, whole.layers),
        ("groups of heads", sizes.groups, whole.groups),
        ("channels", sizes.channels, whole.channels),
        ("hidden dimensions", sizes.hidden, whole.hidden),
    ):
        if not 0 < left <= had:
            raise UsageError(f"{left} of {had} {what} would be left.", f"Keep from 1 to {had}.")
    first = spec.layers[0].attention
    attentions = {(layer.attention.heads, layer.attention.kv_heads, layer.attention.head_dim) for layer in spec.layers}
    routed = any(layer.experts is not None for layer in spec.layers)
    if sizes.groups < whole.groups and (len(attentions) > 1 or (spec.qk_norm and spec.family == "olmo2")):
        _cannot(spec, "heads", "its heads are normalised together, or differ between layers")
    if sizes.channels < whole.channels and routed:
        _cannot(spec, "channels", "its channels belong to experts")
    if sizes.hidden < whole.hidden and (routed or spec.post_norm or spec.norm_kind != "rms"):
        _cannot(spec, "hidden dimensions", "it has experts, or norms other than RMS norms before attention and MLP")
    assert first.heads % first.kv_heads == 0
    heads = first.heads // first.kv_heads * sizes.groups
    if spec.hidden_size % first.heads == 0 and sizes.hidden % heads:
        near = max(heads, round(sizes.hidden / heads) * heads)
        raise UsageError(
            f"{sizes.hidden} hidden dimensions are no multiple of the {heads} heads, which other runtimes insist on.",
            f"Keep {near} hidden dimensions." if near <= whole.hidden else "Keep another number of heads.",
        )


def _cannot(spec: ModelSpec, what: str, why: str) -> None:
    raise UnsupportedModelError(f"{spec.family} cannot lose {what}: {why}.", "Drop blocks, or prune single weights.")


# -- importance ----------------------------------------------------------------------------------------------
def layer_importance(layer: Layer, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Energy of each group of heads, and of each channel (None for experts)."""
    groups = layer.spec.attention.kv_heads
    heads = structured.group_importance(layer.groups["out"].weights[0], statistics["out"].moment, groups)
    if "mlp_out" not in layer.groups:
        return heads, None
    channels = structured.channel_importance(layer.groups["mlp_out"].weights[0], statistics["mlp_out"].moment)
    return heads, channels


def hidden_importance(layer: Layer, statistics: Statistics) -> torch.Tensor:
    """What each hidden dimension gives to this layer's readers: two shares, of attention's and of the MLP's inputs."""
    total = torch.zeros(())
    for role in ("qkv", "mlp_in"):
        weight = torch.cat(layer.groups[role].weights)
        total = total + structured.shares(structured.channel_importance(weight, statistics[role].moment))
    return total


# -- cutting -------------------------------------------------------------------------------------------------
def cut_layer(spec: ModelSpec, layer: Layer, kept: Kept, statistics: Statistics | None, correct: bool) -> None:
    """Cut a layer in place. `correct`: the columns that stay make up for those that went, by least squares.

    statistics of the layer's inputs as it was; None where nothing but blocks goes.
    """
    a = layer.spec.attention
    groups, channels = kept.groups.get(layer.index), kept.channels.get(layer.index)
    if kept.hidden is not None:
        assert statistics is not None, "norms that get narrower need statistics"
        _cut_norms(layer, kept.hidden, statistics)
    _Cutter(layer, statistics if correct else None, kept.hidden).cut(
        None if groups is None else structured.spread(groups, a.heads // a.kv_heads * a.head_dim),
        None if groups is None else structured.spread(groups, a.head_dim),
        channels,
        spec.intermediate_size,
    )
    if groups is not None:
        cut = replace(a, heads=len(groups) * (a.heads // a.kv_heads), kv_heads=len(groups))
        layer.spec = LayerSpec(cut, layer.spec.experts)


@dataclass(eq=False)
class _Cutter:
    """The linears of one layer, by rows of their outputs and columns of their inputs."""

    layer: Layer
    statistics: Statistics | None
    hidden: torch.Tensor | None

    def cut(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor | None,
        channels: torch.Tensor | None,
        width: int,
    ) -> None:
        """queries, keys: rows of q, and of k and v; None: all."""
        a = self.layer.spec.attention
        sizes = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
        self._columns("qkv", self.hidden)
        self._columns("out", queries)
        if queries is not None and keys is not None:
            self._rows("qkv", [queries, keys, keys], sizes)
        self._outputs("out")
        if "mlp_in" not in self.layer.groups:
            return
        self._columns("mlp_in", self.hidden)
        self._columns("mlp_out", channels)
        if channels is not None:
            parts = torch.cat(self.layer.groups["mlp_in"].weights).shape[0] // width
            self._rows("mlp_in", [channels] * parts, [width] * parts)
        self._outputs("mlp_out")

    def _group(self, role: str) -> LinearGroup:
        return self.layer.groups[role]

    def _columns(self, role: str, kept: torch.Tensor | None) -> None:
        if kept is not None:
            group, moment = self._group(role), None if self.statistics is None else self.statistics[role].moment
            group.weights = [structured.keep_columns(weight, kept, moment) for weight in group.weights]

    def _rows(self, role: str, rows: list[torch.Tensor], sizes: list[int]) -> None:
        group = self._group(role)
        group.weights, group.biases = structured.take_rows(group.weights, group.biases, rows, sizes)

    def _outputs(self, role: str) -> None:
        """The rows that write to the hidden dimensions which stay."""
        if self.hidden is not None:
            self._rows(role, [self.hidden], [0])


def _cut_norms(layer: Layer, hidden: torch.Tensor, statistics: Statistics) -> None:
    for role, reader in (("attention_norm", "qkv"), ("mlp_norm", "mlp_in")):
        if role in layer.norms:
            layer.norms[role] = cut_norm(layer.norms[role], hidden, statistics[reader])


def cut_norm(weight: torch.Tensor, hidden: torch.Tensor, after: InputStatistics) -> torch.Tensor:
    """A norm's effective weight for these dimensions; `after`: statistics of its outputs."""
    energy = after.moment.diagonal() / after.rows / weight.square().clamp(min=1e-12)
    return structured.narrower_norm(weight, hidden, energy)


# -- configuration -------------------------------------------------------------------------------------------
def config_changes(config: Mapping[str, Any], spec: ModelSpec, kept: Kept, sizes: Sizes) -> dict[str, Any]:
    """Keys of config.json that are others for the model that is left."""
    a = spec.layers[0].attention
    changes: dict[str, Any] = {}
    if sizes.layers < len(spec.layers):
        changes["num_hidden_layers"] = sizes.layers
        for key in PER_LAYER:
            value = config.get(key)
            if key == "mlp_only_layers" and value:
                changes[key] = [new for new, old in enumerate(kept.layers) if old in value]
            elif isinstance(value, list) and len(value) == len(spec.layers):
                changes[key] = [value[old] for old in kept.layers]
    if sizes.groups < a.kv_heads:
        changes |= {"num_attention_heads": a.heads // a.kv_heads * sizes.groups, "num_key_value_heads": sizes.groups}
    if sizes.channels < spec.intermediate_size:
        changes["intermediate_size"] = sizes.channels
    if sizes.hidden < spec.hidden_size:
        changes["hidden_size"] = sizes.hidden
    if changes.keys() & {"num_attention_heads", "hidden_size"}:
        changes["head_dim"] = a.head_dim
    return changes


def smaller_spec(config: Mapping[str, Any], spec: ModelSpec, kept: Kept, sizes: Sizes) -> ModelSpec:
    """The spec that the new configuration describes.

    Raises UnsupportedModelError where it cannot describe what is left: its layers would be other layers.
    """
    try:
        new = spec_of_config(config)
    except MiaotuiError as error:
        raise UnsupportedModelError(
            f"{spec.family} has no such smaller model: {error.message}", "Cut something else."
        ) from error
    found, wanted = Sizes.of(new), sizes
    same = vars(found) == vars(wanted) and all(getattr(new, key) == getattr(spec, key) for key in SCALES)
    for layer, old in zip(new.layers, kept.layers, strict=False):
        same = same and _same_layer(layer, spec.layers[old])
    if not same:
        raise UnsupportedModelError(
            f"The configuration of {spec.family} cannot say what would be left of this model.",
            "Drop other blocks, or cut something else.",
        )
    return new


def _same_layer(new: LayerSpec, old: LayerSpec) -> bool:
    """But for how many heads there are."""
    a, b = new.attention, old.attention
    ropes = [None if x.rope is None else (x.rope.factor, x.rope.interleaved, tuple(x.rope.inv_freq)) for x in (a, b)]
    if ropes[0] is not None and ropes[1] is not None:
        if not np.allclose(ropes[0][2], ropes[1][2]) or ropes[0][:2] != ropes[1][:2]:
            return False
    elif ropes[0] is not ropes[1]:
        return False
    kinds = [(x.head_dim, x.window, x.softcap, round(x.scale, 9)) for x in (a, b)]
    return kinds[0] == kinds[1] and new.experts == old.experts
