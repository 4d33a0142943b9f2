"""The names and shapes of a model's tensors, from its spec alone: what `weights.py` will ask a checkpoint for."""

from __future__ import annotations

from collections.abc import Iterator

from miaotui.model.names import Names
from miaotui.model.spec import LayerSpec, ModelSpec

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(spec: ModelSpec, names: Names) -> Shapes:
    """The tensors that `prepare_weights` will ask for, with their shapes."""
    table = (spec.vocab_size, spec.hidden_size)
    yield f"{names.embedding}.weight", table
    for index, layer in enumerate(spec.layers):
        yield from _attention_shapes(spec, names, index, layer)
        yield from _mlp_shapes(spec, names, index, layer)
    yield from _norm_shapes(spec, (names.norm,), spec.hidden_size)
    if not spec.tied_head:
        yield f"{names.head}.weight", table


def _attention_shapes(spec: ModelSpec, names: Names, index: int, layer: LayerSpec) -> Shapes:
    a, hidden = layer.attention, spec.hidden_size
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    yield from _linear_shapes(names.stems("qkv", index), (queries, keys, keys), hidden, spec.qkv_bias)
    yield from _linear_shapes(names.stems("out", index), (hidden,), queries, spec.out_bias)
    if spec.pre_norm:
        yield from _norm_shapes(spec, names.stems("attention_norm", index), hidden)
    if spec.post_norm:
        yield from _norm_shapes(spec, names.stems("attention_post_norm", index), hidden)
    if spec.qk_norm:
        over_all = spec.family == "olmo2"  # the only family that does not normalise head by head
        yield from _norm_shapes(spec, names.stems("q_norm", index), queries if over_all else a.head_dim)
        yield from _norm_shapes(spec, names.stems("k_norm", index), keys if over_all else a.head_dim)


def _mlp_shapes(spec: ModelSpec, names: Names, index: int, layer: LayerSpec) -> Shapes:
    hidden, stacked = spec.hidden_size, 2 if spec.gated_mlp else 1
    if spec.pre_norm:
        yield from _norm_shapes(spec, names.stems("mlp_norm", index), hidden)
    if spec.post_norm:
        yield from _norm_shapes(spec, names.stems("mlp_post_norm", index), hidden)
    if layer.experts is None:
        width = spec.intermediate_size
        yield from _linear_shapes(names.stems("mlp_in", index), (width,) * stacked, hidden, spec.mlp_bias)
        yield from _linear_shapes(names.stems("mlp_out", index), (hidden,), width, spec.mlp_bias)
        return
    yield from _linear_shapes(names.stems("router", index), (layer.experts.count,), hidden)
    for expert in range(layer.experts.count):
        width = layer.experts.width
        yield from _linear_shapes(names.stems("expert_in", index, expert), (width, width), hidden)
        yield from _linear_shapes(names.stems("expert_out", index, expert), (hidden,), width)


def _linear_shapes(stems: tuple[str, ...], rows: tuple[int, ...], width: int, bias: bool = False) -> Shapes:
    """One matrix for each stem; where a family stores them all in one, one of all the rows."""
    for stem, count in zip(stems, rows if len(stems) == len(rows) else (sum(rows),), strict=True):
        yield f"{stem}.weight", (count, width)
        if bias:
            yield f"{stem}.bias", (count,)


def _norm_shapes(spec: ModelSpec, stems: tuple[str, ...], width: int) -> Shapes:
    for stem in stems:
        yield f"{stem}.weight", (width,)
        if spec.norm_kind == "layer":
            yield f"{stem}.bias", (width,)
