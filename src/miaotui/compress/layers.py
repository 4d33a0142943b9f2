"""A model's layers as torch tensors, read one at a time, and what the decoder runs them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from miaotui.backends.ops import ExpertsWeight, NormWeight
from miaotui.compress.places import Model
from miaotui.compress.types import KEPT, Layer, LinearGroup, LinearScheme, Place
from miaotui.compress.windows import Inputs, Listen, WindowLinear, WindowOps
from miaotui.model.decoder import LayerWeights, decoder_layer
from miaotui.model.spec import ModelSpec

NORM_ROLES = ("attention_norm", "attention_post_norm", "q_norm", "k_norm", "mlp_norm", "mlp_post_norm")

SchemeOf = Callable[[Place], LinearScheme]


def read_layer(model: Model, index: int, scheme_of: SchemeOf = lambda place: KEPT, device: str = "cpu") -> Layer:
    """One layer of a checkpoint in float32.

    Raises CheckpointError for a tensor that is missing.
    """
    layer = Layer(index, model.spec.layers[index], {})
    present = [place for place in model.places() if place.layer == index]
    for place in present:
        if place.bias:
            continue
        value = _values(model, place, device)
        bias = replace(place, bias=True)
        offset = _values(model, bias, device) if bias in present else None
        if place.role in NORM_ROLES:
            layer.norms[place.role] = value
            if offset is not None:
                layer.norm_biases[place.role] = offset
        elif place.role == "router":
            layer.router = value
        else:
            _join(layer, place, value, offset, scheme_of(place))
    return layer


def _join(layer: Layer, place: Place, weight: torch.Tensor, bias: torch.Tensor | None, scheme: LinearScheme) -> None:
    key = place.role if place.expert is None else f"{place.role}.{place.expert}"
    group = layer.groups.setdefault(key, LinearGroup(place.role, (), [], None if bias is None else [], ()))
    group.places += (place,)
    group.weights.append(weight)
    group.schemes += (scheme,)
    if bias is not None:
        assert group.biases is not None, f"some of {place.role} have a bias and some have none"
        group.biases.append(bias)


def _values(model: Model, place: Place, device: str) -> torch.Tensor:
    return torch.from_numpy(np.array(model.values(place).dense32())).to(device)


def read_matrix(model: Model, role: str) -> torch.Tensor:
    """The embedding, or the head (where it is tied: the embedding), `[vocabulary, hidden]` float32."""
    tied = role == "head" and model.spec.tied_head
    return _values(model, Place("embedding") if tied else Place(role), "cpu")


# -- running -----------------------------------------------------------------------------------------------------
def layer_weights(spec: ModelSpec, layer: Layer) -> LayerWeights:
    """What `decoder_layer` takes; keys are those of `layer.groups`."""
    linear = {key: _linear(key, group) for key, group in layer.groups.items()}
    norms: dict[str, Any] = {role: _norm(spec, layer, role) for role in layer.norms}
    experts = layer.spec.experts
    if experts is None:
        return LayerWeights(linear["qkv"], linear["out"], **norms, mlp_in=linear["mlp_in"], mlp_out=linear["mlp_out"])
    assert layer.router is not None, "a layer with experts has a router"
    numbers = range(experts.count)
    routed = ExpertsWeight(
        WindowLinear((layer.router,), key="router"),
        tuple(linear[f"expert_in.{i}"] for i in numbers),
        tuple(linear[f"expert_out.{i}"] for i in numbers),
    )
    return LayerWeights(linear["qkv"], linear["out"], **norms, experts=routed)


def _linear(key: str, group: LinearGroup) -> WindowLinear:
    return WindowLinear(tuple(group.weights), None if group.biases is None else tuple(group.biases), key)


def _norm(spec: ModelSpec, layer: Layer, role: str) -> NormWeight:
    weight = layer.norms[role]
    return NormWeight(weight, layer.norm_biases.get(role), spec.norm_eps, weight.shape[0], spec.norm_kind)


def run_layer(
    spec: ModelSpec,
    layer: Layer,
    hidden: torch.Tensor,
    *,
    product: torch.dtype = torch.float32,
    listen: Listen | None = None,
    inputs: Inputs | None = None,
) -> torch.Tensor:
    """The residual stream `[windows, length, hidden]` after a layer; differentiable in its weights."""
    ops = WindowOps(hidden.shape[1], product=product, listen=listen, inputs=inputs)
    out = decoder_layer(ops, spec, layer.index, layer.spec, layer_weights(spec, layer), hidden.flatten(0, 1))
    return out.view(hidden.shape)
