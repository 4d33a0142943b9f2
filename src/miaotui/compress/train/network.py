"""The one decoder over windows of tokens, from tensors by place: differentiable in any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from miaotui.backends.ops import ExpertsWeight, NormWeight
from miaotui.compress.layers import NORM_ROLES
from miaotui.compress.places import Model
from miaotui.compress.types import Place
from miaotui.compress.windows import WindowLinear, WindowOps
from miaotui.model.decoder import LayerWeights, decoder_layer
from miaotui.model.spec import ModelSpec

Values = Mapping[Place, torch.Tensor]
"""Effective tensors: q and k in halves, norms with their offset added."""


@dataclass(frozen=True, eq=False)
class AdaptedLinear(WindowLinear):
    """A linear with low-rank additions (Hu et al. 2021): y_i = x·W_iᵀ + x·down_iᵀ·up_iᵀ.

    down `[rank, in]`, up `[out_i, rank]`, any scale in `up`; None where a matrix has no addition.
    """

    adapters: tuple[tuple[torch.Tensor, torch.Tensor] | None, ...] = ()


class TrainOps(WindowOps):
    """`WindowOps` that also multiply by low-rank additions, at their own cost."""

    def _product(self, x: torch.Tensor, linear: WindowLinear) -> torch.Tensor:
        y = super()._product(x, linear)
        if not isinstance(linear, AdaptedLinear):
            return y
        x, added = x.to(self.product), []
        for weight, adapter in zip(linear.weights, linear.adapters, strict=True):
            if adapter is None:
                added.append(y.new_zeros((len(y), len(weight))))
                continue
            down, up = (factor.to(self.product) for factor in adapter)
            added.append((x @ down.T @ up.T).float())
        return y + torch.cat(added, dim=1)


Adapters = Mapping[Place, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Reading:
    """What a network made of windows: the normalised last hidden state `[rows, hidden]`, from which logits follow,
    and the residual stream `[rows, hidden]` after each layer that was asked for, by its number."""

    last: torch.Tensor
    states: Mapping[int, torch.Tensor]


def read(model: Model, *, matrices: torch.dtype = torch.float32, device: str = "cpu") -> dict[Place, torch.Tensor]:
    """All tensors of a checkpoint by place; matrices in that type, everything else float32.

    Raises CheckpointError for one that is missing.
    """
    found = {}
    for place in model.places():
        value = torch.from_numpy(model.values(place).dense32().copy())
        found[place] = value.to(device, matrices if value.dim() == 2 else torch.float32)
    return found


def run(
    spec: ModelSpec,
    values: Values,
    tokens: torch.Tensor,
    *,
    adapters: Adapters | None = None,
    states: frozenset[int] = frozenset(),
    product: torch.dtype = torch.float32,
    recompute: bool = False,
) -> Reading:
    """Read windows of tokens `[windows, length]`.

    states: layers whose output is kept. recompute: layers keep nothing for the gradient but their input, and are run
    again for it (Chen et al. 2016).
    """
    ops = TrainOps(tokens.shape[1], tokens=tokens, product=product)
    h = ops.embed(WindowLinear((values[Place("embedding")],)), scale=spec.embedding_scale)
    kept = {}
    by_layer = _by_layer(values)
    for index, layer in enumerate(spec.layers):
        weights = _layer_weights(spec, by_layer[index], adapters or {})
        if recompute and torch.is_grad_enabled():
            h = checkpoint(decoder_layer, ops, spec, index, layer, weights, h, use_reentrant=False)
        else:
            h = decoder_layer(ops, spec, index, layer, weights, h)
        if index in states:
            kept[index] = h
    return Reading(ops.norm(h, _norm(spec, values, Place("norm"))), kept)


def head_of(spec: ModelSpec) -> Place:
    """Where the matrix lies that makes logits."""
    return Place("embedding") if spec.tied_head else Place("head")


def logits(
    spec: ModelSpec, last: torch.Tensor, head: torch.Tensor, *, product: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits `[rows, vocabulary]` of last hidden states `[rows, hidden]`."""
    ops = WindowOps(1, product=product)
    return ops.logits(last, WindowLinear((head,)), scale=spec.logits_scale, softcap=spec.logits_softcap)


# -- weights -----------------------------------------------------------------------------------------------------
def _by_layer(values: Values) -> list[dict[Place, torch.Tensor]]:
    count = 1 + max(place.layer for place in values)
    layers: list[dict[Place, torch.Tensor]] = [{} for _ in range(count)]
    for place, value in values.items():
        if place.layer >= 0:
            layers[place.layer][place] = value
    return layers


def _layer_weights(spec: ModelSpec, values: Values, adapters: Adapters) -> LayerWeights:
    """One layer's tensors as the decoder takes them."""
    index = next(iter(values)).layer
    groups: dict[tuple[str, int | None], list[Place]] = {}
    norms: dict[str, Any] = {}
    for place in sorted(values, key=lambda p: (p.role, -1 if p.expert is None else p.expert, p.part, p.bias)):
        if place.role in NORM_ROLES:
            norms[place.role] = _norm(spec, values, replace(place, bias=False))
        elif not place.bias:
            groups.setdefault((place.role, place.expert), []).append(place)
    linear = {key: _linear(values, places, adapters) for key, places in groups.items()}
    attention = LayerWeights(linear["qkv", None], linear["out", None], **norms)
    experts = spec.layers[index].experts
    if experts is None:
        return replace(attention, mlp_in=linear["mlp_in", None], mlp_out=linear["mlp_out", None])
    numbers = range(experts.count)
    routed = ExpertsWeight(
        linear["router", None],
        tuple(linear["expert_in", i] for i in numbers),
        tuple(linear["expert_out", i] for i in numbers),
    )
    return replace(attention, experts=routed)


def _linear(values: Values, places: list[Place], adapters: Adapters) -> WindowLinear:
    weights = tuple(values[place] for place in places)
    biases = [values.get(replace(place, bias=True)) for place in places]
    present = tuple(bias for bias in biases if bias is not None)
    assert len(present) in (0, len(places)), "some matrices of a role have a bias and some have none"
    found = tuple(adapters.get(place) for place in places)
    if any(adapter is not None for adapter in found):
        return AdaptedLinear(weights, present or None, adapters=found)
    return WindowLinear(weights, present or None)


def _norm(spec: ModelSpec, values: Values, place: Place) -> NormWeight:
    weight = values[place]
    return NormWeight(weight, values.get(replace(place, bias=True)), spec.norm_eps, weight.shape[0], spec.norm_kind)
