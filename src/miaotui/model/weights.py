"""A checkpoint's tensors, one role at a time, into a backend's prepared weights. Every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.ops import Attention, ExpertsWeight, NormWeight, Ops
from miaotui.checkpoint.base import Checkpoint
from miaotui.errors import CheckpointError
from miaotui.model.decoder import LayerWeights, Weights
from miaotui.model.names import Names
from miaotui.model.spec import ExpertsSpec, LayerSpec, ModelSpec
from miaotui.quant.tensor import BlockTensor, DenseTensor, Tensor

Vector = NDArray[np.float32]
Order = NDArray[np.int64] | slice


def prepare_weights(ops: Ops[Any], spec: ModelSpec, names: Names, checkpoint: Checkpoint) -> Weights:
    """Stream all weights into `ops`. At most the parts of one stacked matrix are held at a time.

    Raises CheckpointError, naming it, for a tensor that is missing, left over, or not of the shape the spec needs.
    """
    reader = _Reader(ops, spec, names, checkpoint)
    table = reader.tensor(names.embedding + ".weight", (spec.vocab_size, spec.hidden_size))
    embedding = ops.prepare_embedding(table)
    layers = tuple(reader.layer(index, layer) for index, layer in enumerate(spec.layers))
    norm = reader.norm(names.norm, spec.hidden_size)
    head = embedding
    if not spec.tied_head:
        head = ops.prepare_linear([reader.tensor(names.head + ".weight", (spec.vocab_size, spec.hidden_size))])
    reader.check_all_used()
    return Weights(embedding, layers, norm, head)


@dataclass(eq=False)
class _Reader:
    """Takes tensors by role and remembers which were taken."""

    ops: Ops[Any]
    spec: ModelSpec
    names: Names
    checkpoint: Checkpoint
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.present = frozenset(self.checkpoint.names())

    # -- one layer ---------------------------------------------------------------------------------------
    def layer(self, index: int, layer: LayerSpec) -> LayerWeights:
        spec, attention = self.spec, layer.attention
        q_width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        weights = LayerWeights(
            qkv=self.qkv(index, attention),
            out=self.linear("out", index, (spec.hidden_size,), q_width, bias=spec.out_bias),
            attention_norm=self.role_norm("attention_norm", index, when=spec.pre_norm),
            attention_post_norm=self.role_norm("attention_post_norm", index, when=spec.post_norm),
            q_norm=self.role_norm("q_norm", index, (attention.head_dim, q_width), when=spec.qk_norm),
            k_norm=self.role_norm("k_norm", index, (attention.head_dim, kv_width), when=spec.qk_norm),
            mlp_norm=self.role_norm("mlp_norm", index, when=spec.pre_norm),
            mlp_post_norm=self.role_norm("mlp_post_norm", index, when=spec.post_norm),
        )
        if layer.experts is not None:
            return replace(weights, experts=self.experts(index, layer.experts))
        width, stacked = spec.intermediate_size, 2 if spec.gated_mlp else 1
        return replace(
            weights,
            mlp_in=self.linear("mlp_in", index, (width,) * stacked, spec.hidden_size, bias=spec.mlp_bias),
            mlp_out=self.linear("mlp_out", index, (spec.hidden_size,), width, bias=spec.mlp_bias),
        )

    def qkv(self, index: int, a: Attention) -> Any:
        rows = (a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim)
        orders: tuple[Order, ...] = (slice(None),) * 3
        if self.names.interleaved:
            orders = (halves(a.heads, a.head_dim), halves(a.kv_heads, a.head_dim), slice(None))
        return self.linear("qkv", index, rows, self.spec.hidden_size, bias=self.spec.qkv_bias, orders=orders)

    def experts(self, index: int, e: ExpertsSpec) -> ExpertsWeight:
        hidden = self.spec.hidden_size
        router = self.linear("router", index, (e.count,), hidden)
        stacked = [stem + ".weight" for role in ("experts_in", "experts_out") for stem in self.names.stems(role, index)]
        if stacked and stacked[0] in self.present:
            return self._stacked_experts(router, stacked, e)
        gate_up, down = [], []
        for expert in range(e.count):
            gate_up.append(self.linear("expert_in", index, (e.width, e.width), hidden, expert=expert))
            down.append(self.linear("expert_out", index, (hidden,), e.width, expert=expert))
        return ExpertsWeight(router, tuple(gate_up), tuple(down))

    def _stacked_experts(self, router: Any, names: list[str], e: ExpertsSpec) -> ExpertsWeight:
        """GGUF's gate, up and down `[experts, out, in]`."""
        hidden = self.spec.hidden_size
        gate, up, down = (
            self.tensor(name, shape)
            for name, shape in zip(names, [(e.count, e.width, hidden)] * 2 + [(e.count, hidden, e.width)], strict=True)
        )
        prepare = self.ops.prepare_linear
        return ExpertsWeight(
            router,
            tuple(prepare([_slice(gate, i), _slice(up, i)]) for i in range(e.count)),
            tuple(prepare([_slice(down, i)]) for i in range(e.count)),
        )

    # -- one role ----------------------------------------------------------------------------------------
    def linear(
        self,
        role: str,
        index: int,
        rows: tuple[int, ...],
        width: int,
        *,
        bias: bool = False,
        expert: int | None = None,
        orders: tuple[Order, ...] | None = None,
    ) -> Any:
        """The role's matrices, `[rows[i], width]` each, or all in one where the family stores them so; stacked.

        orders: for each matrix, the order in which its rows are wanted.
        """
        stems = self.names.stems(role, index, expert)
        if len(stems) != len(rows):
            rows, orders = (sum(rows),), None
        chosen = orders or (slice(None),) * len(rows)
        parts = [
            self.tensor(stem + ".weight", (count, width)).rows(order)
            for stem, count, order in zip(stems, rows, chosen, strict=True)
        ]
        if not bias:
            return self.ops.prepare_linear(parts)
        pieces = zip(stems, rows, chosen, strict=True)
        biases = [np.asarray(self.vector(stem + ".bias", count)[order]) for stem, count, order in pieces]
        return self.ops.prepare_linear(parts, np.concatenate(biases))

    def role_norm(self, role: str, index: int, widths: tuple[int, ...] = (), *, when: bool) -> NormWeight | None:
        if not when:
            return None
        (stem,) = self.names.stems(role, index)
        return self.norm(stem, *(widths or (self.spec.hidden_size,)))

    def norm(self, stem: str, *widths: int) -> NormWeight:
        """A norm as wide as one of `widths`, any offset folded in."""
        spec = self.spec
        weight = self.vector(stem + ".weight", *widths) + np.float32(spec.norm_offset)
        bias = self.vector(stem + ".bias", len(weight)) if spec.norm_kind == "layer" else None
        return self.ops.prepare_norm(weight, spec.norm_eps, bias=bias, kind=spec.norm_kind)

    # -- one tensor --------------------------------------------------------------------------------------
    def tensor(self, name: str, shape: Sequence[int | None]) -> Tensor:
        """The tensor, of this shape (None: any)."""
        tensor = self.checkpoint.tensor(name)
        self.taken.add(name)
        fits = len(tensor.shape) == len(shape)
        if not fits or any(want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
            _misfit(name, tensor.shape, shape)
        return tensor

    def vector(self, name: str, *widths: int) -> Vector:
        tensor = self.checkpoint.tensor(name)
        self.taken.add(name)
        if len(tensor.shape) != 1 or tensor.shape[0] not in widths:
            _misfit(name, tensor.shape, widths[:1])
        return tensor.dense32()

    def check_all_used(self) -> None:
        """A tensor that nobody asked for would have changed the answer."""
        ignorable = self.names.ignorable + ((self.names.head + ".weight",) if self.spec.tied_head else ())
        left = [n for n in self.present - self.taken if not any(part in n for part in ignorable)]
        if left:
            cause = f"{self.checkpoint.path} holds {len(left)} tensors that {self.spec.family} does not use: "
            cause += ", ".join(sorted(left)[:4]) + "."
            raise CheckpointError(cause, "Its configuration is of another model, or the model is of a newer kind.")


def halves(heads: int, head_dim: int) -> NDArray[np.int64]:
    """For each row of Q or K, where llama.cpp's converter has put it: (head, half, i) lies at (head, i, half)."""
    rows = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _slice(tensor: Tensor, index: int) -> Tensor:
    """Matrix `index` of a stack `[n, out, in]`, a view."""
    assert isinstance(tensor, DenseTensor | BlockTensor), "only GGUF has stacks"
    if isinstance(tensor, DenseTensor):
        return replace(tensor, data=tensor.data[index])
    return replace(tensor, data=tensor.data[index], shape=tensor.shape[1:])


def _misfit(name: str, found: Sequence[int], wanted: Sequence[int | None]) -> NoReturn:
    need = " × ".join("any" if size is None else str(size) for size in wanted)
    cause = f"The tensor {name!r:.100} is {' × '.join(map(str, found))} where the configuration needs {need}."
    raise CheckpointError(cause, "Take weights and configuration from the same repository.")
