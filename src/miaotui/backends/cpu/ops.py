"""The op contract as a recorder: every call notes a node; nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.cpu._native import Heap, Pool
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
from miaotui.backends.cpu.weights import Linear, Matrix, WeightStore, stored_matrix
from miaotui.backends.ops import Activation, Attention, ExpertsWeight, NormWeight
from miaotui.quant.tensor import Tensor


class CpuOps:
    """`Ops` whose buffer is a `Value`. `nodes` is the step, in order."""

    def __init__(self, pool: Pool, store: WeightStore | None = None) -> None:
        self._pool = pool
        self._heap = Heap()
        self._store = store
        self.nodes: list[Node] = []

    # -- weights -----------------------------------------------------------------------------------------
    def prepare_linear(self, parts: Sequence[Tensor], bias: NDArray[np.float32] | None = None) -> Linear:
        return Linear(tuple(stored_matrix(self._pool, self._heap, part, self._store) for part in parts), bias)

    def prepare_embedding(self, table: Tensor) -> Matrix:
        return stored_matrix(self._pool, self._heap, table, self._store)

    def prepare_norm(
        self,
        weight: NDArray[np.float32],
        eps: float,
        *,
        bias: NDArray[np.float32] | None = None,
        kind: Literal["rms", "layer"] = "rms",
    ) -> NormWeight:
        kept = np.array(weight, dtype=np.float32)
        offset = None if bias is None else np.array(bias, dtype=np.float32)
        return NormWeight(kept, offset, eps, kept.shape[0], kind)

    # -- the step ----------------------------------------------------------------------------------------
    def embed(self, table: Matrix, *, scale: float = 1.0) -> Value:
        return self._note(EmbedNode([], Value(table.width), table, scale))

    def norm(self, x: Value, weight: NormWeight, *, add: Value | None = None) -> Value:
        return self._note(NormNode(_inputs(x, add), Value(x.width, x.of_logits), weight))

    def linear(self, x: Value, weight: Linear, *, add: Value | None = None, scale: float = 1.0) -> Value:
        return self._note(LinearNode(_inputs(x, add), Value(weight.height, x.of_logits), weight, scale))

    def rope_and_cache(
        self,
        qkv: Value,
        layer: int,
        attention: Attention,
        *,
        q_norm: NormWeight | None = None,
        k_norm: NormWeight | None = None,
    ) -> Value:
        return self._note(RopeNode([qkv], qkv, layer, attention, q_norm, k_norm))

    def attention(self, q: Value, layer: int, attention: Attention) -> Value:
        return self._note(AttentionNode([q], Value(attention.heads * attention.head_dim), layer, attention))

    def gated(self, x: Value, activation: Activation) -> Value:
        return self._note(ActivateNode([x], Value(x.width // 2, x.of_logits), activation, gated=True))

    def activate(self, x: Value, activation: Activation) -> Value:
        return self._note(ActivateNode([x], Value(x.width, x.of_logits), activation, gated=False))

    def experts(
        self,
        x: Value,
        weight: ExpertsWeight,
        activation: Activation,
        *,
        top_k: int,
        normalise: bool,
        add: Value | None = None,
    ) -> Value:
        routed = self._note(LinearNode([x], Value(weight.router.height), weight.router, exact=True))
        inputs = [*_inputs(x, None), routed] + ([] if add is None else [add])
        return self._note(ExpertsNode(inputs, Value(x.width), weight, activation, top_k, normalise))

    def select_rows(self, x: Value) -> Value:
        return self._note(SelectNode([x], Value(x.width, of_logits=True)))

    def logits(self, x: Value, head: Linear | Matrix, *, scale: float = 1.0, softcap: float | None = None) -> Value:
        weight = Linear((head,)) if isinstance(head, Matrix) else head
        return self._note(LinearNode([x], Value(weight.height, x.of_logits), weight, scale, softcap or 0.0))

    def _note(self, node: Node) -> Value:
        self.nodes.append(node)
        return node.output


def _inputs(x: Value, add: Value | None) -> list[Value]:
    return [x] if add is None else [x, add]
