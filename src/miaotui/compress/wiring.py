"""What stands before each group of linears and could take up a scale of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from miaotui.compress.methods.fold import (
    into_columns,
    into_moment,
    into_norm,
    into_rows,
    shared_by_heads,
    value_rows,
)
from miaotui.compress.types import InputStatistics, Layer, LinearGroup, Place
from miaotui.model.spec import ModelSpec


@dataclass(frozen=True)
class Slot:
    """Some rows of one matrix of a group: the values among q, k and v; the up projection among gate and up."""

    group: str
    part: int
    rows: slice

    def change(self, layer: Layer, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put these rows, and their bias, through `how`."""
        group = layer.groups[self.group]
        group.weights[self.part] = _replaced(group.weights[self.part], self.rows, how)
        if group.biases is not None:
            group.biases[self.part] = _replaced(group.biases[self.part], self.rows, how)
            layer.changed.add(replace(group.places[self.part], bias=True))


def _replaced(values: torch.Tensor, rows: slice, how: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    changed = values.clone()
    changed[rows] = how(values[rows])
    return changed


def value_slot(layer: Layer) -> Slot:
    """Where a layer's value rows are."""
    attention, weights = layer.spec.attention, layer.groups["qkv"].weights
    if len(weights) == 3:
        return Slot("qkv", 2, slice(0, len(weights[2])))
    rows = len(weights[0])
    return Slot("qkv", 0, slice(rows - attention.kv_heads * attention.head_dim, rows))


def up_slot(layer: Layer, key: str) -> Slot:
    """Where the up rows are; `key` is `mlp_in` or `expert_in.3`."""
    weights = layer.groups[key].weights
    if len(weights) == 2:
        return Slot(key, 1, slice(0, len(weights[1])))
    rows = len(weights[0])
    return Slot(key, 0, slice(rows // 2, rows))


def foldable(spec: ModelSpec, layer: Layer, key: str) -> bool:
    """Whether something stands before this group that can take up a scale of its inputs.

    A norm does; so do the values before the output projection and, where the MLP is gated, the up projection before
    the down projection. The inputs of experts are the router's too and are left alone.
    """
    role = layer.groups[key].role
    if role in ("qkv", "mlp_in"):
        return spec.pre_norm
    return role == "out" or (role in ("mlp_out", "expert_out") and (spec.gated_mlp or role == "expert_out"))


def shared(layer: Layer, key: str, values: torch.Tensor, how: str) -> torch.Tensor:
    """Values by input channel, made equal where channels must have one scale: query heads that read the same values."""
    if layer.groups[key].role != "out":
        return values
    attention = layer.spec.attention
    return shared_by_heads(values, attention.kv_heads, attention.head_dim, how)


def fold(layer: Layer, key: str, scale: torch.Tensor) -> None:
    """Divide a group's inputs by `scale` `[in]` in what comes before, multiply its columns, and tell its statistics."""
    group = layer.groups[key]
    if group.role in ("qkv", "mlp_in"):
        norm = "attention_norm" if group.role == "qkv" else "mlp_norm"
        layer.norms[norm] = into_norm(layer.norms[norm], scale)
        layer.changed.add(Place(norm, layer.index))
        if norm in layer.norm_biases:
            layer.norm_biases[norm] = into_norm(layer.norm_biases[norm], scale)
            layer.changed.add(Place(norm, layer.index, bias=True))
    elif group.role == "out":
        attention = layer.spec.attention
        by_value = value_rows(scale, attention.kv_heads, attention.head_dim)
        value_slot(layer).change(layer, lambda rows: into_rows(rows, by_value))
        if layer.value_peaks is not None:
            layer.value_peaks = layer.value_peaks / by_value
    else:
        up_slot(layer, key.replace("_out", "_in")).change(layer, lambda rows: into_rows(rows, scale))
    group.weights = [into_columns(weight, scale) for weight in group.weights]
    _tell(group, scale)


def _tell(group: LinearGroup, scale: torch.Tensor) -> None:
    found = group.statistics
    if found is not None:
        group.statistics = InputStatistics(
            into_moment(found.moment, scale), found.mean_abs / scale, found.low / scale, found.high / scale, found.rows
        )
