"""The one forward pass, written over the op contract. It knows neither format, nor device, nor quantisation.

An eager backend computes it for every step; a recording backend is led through it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miaotui.backends.ops import B, ExpertsWeight, NormWeight, Ops
from miaotui.model.spec import LayerSpec, ModelSpec


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's prepared weights; which of the optional ones are there follows from the spec."""

    qkv: Any
    out: Any
    attention_norm: NormWeight | None = None
    attention_post_norm: NormWeight | None = None
    q_norm: NormWeight | None = None
    k_norm: NormWeight | None = None
    mlp_norm: NormWeight | None = None
    mlp_post_norm: NormWeight | None = None
    mlp_in: Any = None
    """gate and up stacked; only up for a plain MLP."""
    mlp_out: Any = None
    experts: ExpertsWeight | None = None


@dataclass(frozen=True, eq=False)
class Weights:
    """A model's prepared weights. A tied head is the embedding's own object."""

    embedding: Any
    layers: tuple[LayerWeights, ...]
    norm: NormWeight
    head: Any


def forward(ops: Ops[B], spec: ModelSpec, weights: Weights) -> B:
    """Logits `[rows wanted, vocabulary]` for the step's tokens.

    Rows whose logits are not wanted end at the last layer's attention, which has their keys and values. Where experts
    follow, which take all rows of a step, they end after those.
    """
    h = ops.embed(weights.embedding, scale=spec.embedding_scale)
    last = len(spec.layers) - 1
    early = spec.layers[last].experts is None
    for index, (layer, w) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        h = decoder_layer(ops, spec, index, layer, w, h, select=index == last and early)
    h = ops.norm(h if early else ops.select_rows(h), weights.norm)
    return ops.logits(h, weights.head, scale=spec.logits_scale, softcap=spec.logits_softcap)


def decoder_layer(
    ops: Ops[B], spec: ModelSpec, index: int, layer: LayerSpec, w: LayerWeights, h: B, *, select: bool = False
) -> B:
    """The residual stream after one layer; `select`: of the rows whose logits are wanted, the others ending here."""
    x = h if w.attention_norm is None else ops.norm(h, w.attention_norm)
    q = ops.rope_and_cache(ops.linear(x, w.qkv), index, layer.attention, q_norm=w.q_norm, k_norm=w.k_norm)
    x = ops.attention(q, index, layer.attention)
    if select:
        x, h = ops.select_rows(x), ops.select_rows(h)
    h = _add_residual(ops, spec, x, w.out, w.attention_post_norm, h)
    return _mlp_block(ops, spec, layer, w, h)


def _mlp_block(ops: Ops[B], spec: ModelSpec, layer: LayerSpec, w: LayerWeights, h: B) -> B:
    x = h if w.mlp_norm is None else ops.norm(h, w.mlp_norm)
    if layer.experts is not None and w.experts is not None:
        top_k, normalise = layer.experts.top_k, layer.experts.normalise
        return ops.experts(x, w.experts, spec.activation, top_k=top_k, normalise=normalise, add=h)
    x = ops.linear(x, w.mlp_in)
    x = ops.gated(x, spec.activation) if spec.gated_mlp else ops.activate(x, spec.activation)
    return _add_residual(ops, spec, x, w.mlp_out, w.mlp_post_norm, h)


def _add_residual(ops: Ops[B], spec: ModelSpec, x: B, weight: Any, post_norm: NormWeight | None, h: B) -> B:
    """Project x back to the hidden width and add it to the residual stream h."""
    if post_norm is None:
        return ops.linear(x, weight, add=h, scale=spec.residual_scale)
    return ops.norm(ops.linear(x, weight), post_norm, add=h)
