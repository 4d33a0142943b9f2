"""Planned nodes as calls of the native program's recorder, one for each kind of node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.cpu._native import CacheShape, PackedWeight, Program
from miaotui.backends.cpu.nodes import (
    ActivateNode,
    AttentionNode,
    EmbedNode,
    ExpertsNode,
    LinearNode,
    Node,
    NormNode,
    RopeNode,
    SelectNode,
    Value,
)
from miaotui.backends.cpu.plan import Places
from miaotui.backends.cpu.weights import Matrix
from miaotui.backends.ops import CacheType, NormWeight, Rope

Place = tuple[int, int]
"""Offset in the arena in floats, and width."""

Widen = Callable[[PackedWeight], PackedWeight]


class Emitter:
    """Holds what every op needs to know: the program, the places, the ropes' tables and the exactness asked for."""

    def __init__(
        self,
        program: Program,
        places: Places,
        ropes: dict[Rope, tuple[Place, Place]],
        cache: CacheType,
        quantised: bool,
        widen: Widen | None,
    ) -> None:
        self.program = program
        self.places = places
        self.ropes = ropes
        self.cache = cache
        self.quantised = quantised
        self.widen = widen

    def emit(self, node: Node, parts: list[int]) -> None:
        match node:
            case EmbedNode():
                self.program.embed(node.table.packed, node.scale, self._at(node.output))
            case NormNode():
                self._norm(node)
            case LinearNode():
                self._linear(node, parts)
            case RopeNode():
                self._rope(node)
            case AttentionNode():
                self._attention(node)
            case ActivateNode():
                x, out = self._at(node.inputs[0]), self._at(node.output)
                self.program.activate(x, node.activation, node.gated, out, node.output.of_logits)
            case SelectNode():
                self.program.select_rows(self._at(node.inputs[0]), self._at(node.output))
            case ExpertsNode():
                self._experts(node)
            case _:
                raise AssertionError(f"no native op for {type(node).__name__}")

    def _at(self, value: Value) -> Place:
        return self.places.offset[value], value.width

    def _second(self, node: Node) -> Place | None:
        return self._at(node.inputs[1]) if len(node.inputs) > 1 else None

    def _norm(self, node: NormNode) -> None:
        w = node.weight
        x, out = self._at(node.inputs[0]), self._at(node.output)
        layer = w.kind == "layer"
        self.program.norm(x, w.weight, w.bias, w.eps, layer, self._second(node), out, node.output.of_logits)

    def _linear(self, node: LinearNode, parts: list[int]) -> None:
        weight, norm = node.weight, node.norm
        columns = np.cumsum([0, *(part.height for part in weight.parts)])
        chosen = [weight.parts[i] for i in parts]
        self.program.linear(
            name=f"linear {weight.height}x{chosen[0].width} {chosen[0].packed.code}",
            x=self._at(node.inputs[0]),
            weights=[part.packed for part in chosen],
            columns=[int(columns[i]) for i in parts],
            biases=[weight.part_bias(i) for i in parts],
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=0.0 if norm is None else norm.eps,
            norm_layer=norm is not None and norm.kind == "layer",
            add=self._second(node),
            scale=node.scale,
            softcap=node.softcap,
            act=node.activation or "none",
            gated=node.gated,
            quantised=self.quantised and not node.exact,
            of_logits=node.output.of_logits,
            perm=chosen[0].perm,
            hands_on=node.hands_on,
            handed=node.handed,
            wide=self._wide(chosen, node.exact),
            out=self._at(node.output),
        )

    def _wide(self, parts: list[Matrix], exact: bool) -> list[PackedWeight]:
        """The weights once more, integers recoded for many rows, where that was asked for and helps."""
        if self.widen is None or exact or not any(part.in_groups for part in parts):
            return []
        return [self.widen(part.packed) if part.in_groups else part.packed for part in parts]

    def _cache_shape(self, node: RopeNode | AttentionNode) -> CacheShape:
        a = node.attention
        return CacheShape(node.layer, a.heads, a.kv_heads, a.head_dim, self.cache)

    def _rope(self, node: RopeNode) -> None:
        rope = node.attention.rope
        cos, sin = (None, None) if rope is None else self.ropes[rope]
        self.program.rope_and_cache(
            self._cache_shape(node),
            self._at(node.output),
            cos,
            sin,
            rope is not None and rope.interleaved,
            *_head_norm(node.q_norm),
            *_head_norm(node.k_norm),
        )

    def _attention(self, node: AttentionNode) -> None:
        a = node.attention
        q, out = self._at(node.inputs[0]), self._at(node.output)
        self.program.attention(self._cache_shape(node), q, a.scale, a.softcap or 0.0, a.window or 0, out)

    def _experts(self, node: ExpertsNode) -> None:
        w = node.weight
        self.program.experts(
            x=self._at(node.inputs[0]),
            router=self._at(node.inputs[1]),
            gate=[e.parts[0].packed for e in w.gate_up],
            up=[e.parts[1].packed for e in w.gate_up],
            down=[e.parts[0].packed for e in w.down],
            top_k=node.top_k,
            normalise=node.normalise,
            act=node.activation,
            quantised=self.quantised,
            add=self._at(node.inputs[2]) if len(node.inputs) > 2 else None,
            out=self._at(node.output),
        )


def _head_norm(norm: NormWeight | None) -> tuple[NDArray[np.float32] | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)
