"""Whether two specs are of the same mathematics, whatever file each was read from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from miaotui.backends.ops import Attention, Rope
from miaotui.model.spec import LayerSpec, ModelSpec

CLOSE = 1e-5
"""Relative difference that a detour through a file's float32, or through divisors of frequencies, may make."""

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "max_position", "activation", "norm_kind", "pre_norm",
    "post_norm", "qk_norm", "qkv_bias", "out_bias", "mlp_bias", "gated_mlp",
)  # fmt: skip
_NEAR = ("norm_eps", "embedding_scale", "residual_scale", "logits_scale", "logits_softcap")


def difference(a: ModelSpec, b: ModelSpec) -> str | None:
    """The first thing in which two models differ, as words for an error; None where their mathematics is the same.

    What a file says in another way is left out: the family's name, a norm's offset, tied heads and special tokens.
    """
    return next(_differences(a, b), None)


def _differences(a: ModelSpec, b: ModelSpec) -> Iterator[str]:
    for name in _SAME:
        if getattr(a, name) != getattr(b, name):
            yield f"{name} ({getattr(a, name)}, {getattr(b, name)})"
    for name in _NEAR:
        if not _near(getattr(a, name), getattr(b, name)):
            yield f"{name} ({getattr(a, name)}, {getattr(b, name)})"
    if len(a.layers) != len(b.layers):
        yield f"the number of layers ({len(a.layers)}, {len(b.layers)})"
    for index, (one, other) in enumerate(zip(a.layers, b.layers, strict=False)):
        for what in _layer(one, other):
            yield f"{what} of layer {index}"


def _layer(a: LayerSpec, b: LayerSpec) -> Iterator[str]:
    if a.experts != b.experts:
        yield "the experts"
    one, other = a.attention, b.attention
    if (one.heads, one.kv_heads, one.head_dim) != (other.heads, other.kv_heads, other.head_dim):
        yield "the heads"
    if one.window != other.window:
        yield f"the window ({one.window}, {other.window})"
    if not _near(one.scale, other.scale) or not _near(one.softcap, other.softcap):
        yield "the scale of the scores"
    if not _same_rope(one, other):
        yield "the rotary embedding"


def _same_rope(a: Attention, b: Attention) -> bool:
    one: Rope | None = a.rope
    other: Rope | None = b.rope
    if one is None or other is None:
        return one is other
    same = one.interleaved == other.interleaved and one.inv_freq.shape == other.inv_freq.shape
    return same and _near(one.factor, other.factor) and np.allclose(one.inv_freq, other.inv_freq, rtol=CLOSE, atol=0)


def _near(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=CLOSE)
