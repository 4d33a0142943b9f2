"""The dozen ops in eager PyTorch, each as plainly as its definition reads. Float32 throughout, unless said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from miaotui.backends.ops import BLOCK_SIZE, Activation, Attention, ExpertsWeight, NormWeight, Rope, Step
from miaotui.backends.reference.cache import Cache
from miaotui.backends.reference.memory import memory_needed
from miaotui.backends.reference.weights import Linear, Matrix, matrix
from miaotui.quant.tensor import Tensor

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(eq=False)
class StepTensors:
    """A step's index arrays on the device, and what ops of the same step share."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    """Cache slot of each token: block · 16 + offset."""
    sequences: list[tuple[slice, int, torch.Tensor]]
    """For each sequence its rows, its length after the step, its blocks."""
    logits_rows: torch.Tensor
    turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """cos and sin by `id(rope)`."""


def step_tensors(step: Step, device: torch.device) -> StepTensors:
    """Move a step to the device."""
    starts, lengths = step.query_start.tolist(), step.context_len.tolist()
    blocks = torch.from_numpy(step.block_table.astype(np.int64)).to(device)
    positions = torch.from_numpy(step.positions.astype(np.int64)).to(device)
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), np.diff(step.query_start))).to(device)
    sequences = [
        (slice(starts[s], starts[s + 1]), length, blocks[s, : -(-length // BLOCK_SIZE)])
        for s, length in enumerate(lengths)
    ]
    return StepTensors(
        tokens=torch.from_numpy(step.tokens.astype(np.int64)).to(device),
        positions=positions,
        slots=blocks[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        sequences=sequences,
        logits_rows=torch.from_numpy(step.logits_rows.astype(np.int64)).to(device),
    )


def routed(probability: torch.Tensor, top_k: int, normalise: bool) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that is wanted, the rows that want it, and its share of each of these `[rows, 1]`.

    probability: `[rows, experts]`; normalise: the chosen ones' shares sum to 1.
    """
    chosen, index = (part[:, :top_k] for part in torch.sort(probability, dim=1, descending=True, stable=True))
    if normalise:
        chosen = chosen / chosen.sum(dim=1, keepdim=True)
    for expert in sorted(set(index.flatten().tolist())):
        rows, rank = torch.where(index == expert)
        yield expert, rows, chosen[rows, rank, None]


class ReferenceOps:
    """`Ops` over torch tensors. `step` is set by the executor before each forward; weights come first.

    quantise: simulate the native path's int8 activations wherever a weight's stored form is integer.
    half: hold matrices in 16 bits and multiply in them.
    wide: simulate its recoded weights wherever many rows meet integer weights, experts aside.
    """

    def __init__(self, cache: Cache, device: torch.device, *, quantise: bool, half: bool, wide: bool = False) -> None:
        self.cache = cache
        self.device = device
        self.quantise = quantise
        self.half = half
        self.wide = wide
        self.step: StepTensors | None = None
        self.touched: dict[int, int] = {}
        """Bytes of each weight that a product has read, by identity."""

    # -- weights -----------------------------------------------------------------------------------------
    def prepare_linear(self, parts: Sequence[Tensor], bias: NDArray[np.float32] | None = None) -> Linear:
        matrices = tuple(self._matrix(part) for part in parts)
        return Linear(matrices, None if bias is None else self._vector(bias))

    def prepare_embedding(self, table: Tensor) -> Matrix:
        return self._matrix(table)

    def prepare_norm(
        self,
        weight: NDArray[np.float32],
        eps: float,
        *,
        bias: NDArray[np.float32] | None = None,
        kind: Literal["rms", "layer"] = "rms",
    ) -> NormWeight:
        offset = None if bias is None else self._vector(bias)
        return NormWeight(self._vector(weight), offset, eps, weight.shape[0], kind)

    # -- the step ----------------------------------------------------------------------------------------
    def embed(self, table: Matrix, *, scale: float = 1.0) -> torch.Tensor:
        return table.weight[self._step().tokens].float() * scale

    def norm(self, x: torch.Tensor, weight: NormWeight, *, add: torch.Tensor | None = None) -> torch.Tensor:
        y = _normalise(x, weight)
        return y if add is None else add + y

    def linear(
        self, x: torch.Tensor, weight: Linear, *, add: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        y = self._product(x, weight) * scale
        return y if add is None else add + y

    def rope_and_cache(
        self,
        qkv: torch.Tensor,
        layer: int,
        attention: Attention,
        *,
        q_norm: NormWeight | None = None,
        k_norm: NormWeight | None = None,
    ) -> torch.Tensor:
        heads, kv_heads, head_dim = attention.heads, attention.kv_heads, attention.head_dim
        q, k, v = torch.split(qkv, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
        q, k = _normalise_heads(q, q_norm, head_dim), _normalise_heads(k, k_norm, head_dim)
        if attention.rope is not None:
            q, k = self._turn(q, attention.rope), self._turn(k, attention.rope)
        keys, values = self.cache.layers[layer]
        keys.write(self._step().slots, k)
        values.write(self._step().slots, v.reshape(-1, kv_heads, head_dim))
        return q.flatten(1)

    def attention(self, q: torch.Tensor, layer: int, attention: Attention) -> torch.Tensor:
        keys, values = self.cache.layers[layer]
        q = q.view(q.shape[0], attention.kv_heads, -1, attention.head_dim)
        out = [
            _attend(q[rows], keys.read(blocks, length), values.read(blocks, length), attention)
            for rows, length, blocks in self._step().sequences
        ]
        return torch.cat(out)

    def gated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = x.chunk(2, dim=1)
        return ACTIVATIONS[activation](gate) * up

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return ACTIVATIONS[activation](x)

    def experts(
        self,
        x: torch.Tensor,
        weight: ExpertsWeight,
        activation: Activation,
        *,
        top_k: int,
        normalise: bool,
        add: torch.Tensor | None = None,
    ) -> torch.Tensor:
        probability = torch.softmax(weight.router.apply(x, quantise=False), dim=1)
        out = torch.zeros_like(x)
        for expert, rows, share in routed(probability, top_k, normalise):
            y = self.gated(self._product(x[rows], weight.gate_up[expert], wide=False), activation)
            y = self._product(y, weight.down[expert], wide=False)
            out = out.index_add(0, rows, y * share)
        return out if add is None else add + out

    def select_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x[self._step().logits_rows]

    def logits(
        self, x: torch.Tensor, head: Linear | Matrix, *, scale: float = 1.0, softcap: float | None = None
    ) -> torch.Tensor:
        y = self._product(x, head) * scale
        return y if softcap is None else softcap * torch.tanh(y / softcap)

    # -- helpers -----------------------------------------------------------------------------------------
    def _step(self) -> StepTensors:
        assert self.step is not None, "an op was called outside a step"
        return self.step

    def _matrix(self, tensor: Tensor) -> Matrix:
        with memory_needed(self.device, f"the weights (a matrix of {' × '.join(map(str, tensor.shape))})"):
            return matrix(tensor, self.device, self.half, self.wide)

    def _vector(self, values: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(self.device)

    def _product(self, x: torch.Tensor, weight: Linear | Matrix, *, wide: bool = True) -> torch.Tensor:
        self.touched[id(weight)] = weight.nbytes
        return weight.apply(x, quantise=self.quantise, wide=wide)

    def _turn(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Rotate x `[tokens, heads, head_dim]` by its tokens' positions."""
        step = self._step()
        if id(rope) not in step.turns:
            angle = step.positions[:, None].float() * torch.from_numpy(rope.inv_freq).to(self.device)
            step.turns[id(rope)] = (angle.cos() * rope.factor)[:, None], (angle.sin() * rope.factor)[:, None]
        cos, sin = step.turns[id(rope)]
        return _rotate(x, cos, sin, rope.interleaved)


def _normalise(x: torch.Tensor, weight: NormWeight) -> torch.Tensor:
    if weight.kind == "layer":
        return F.layer_norm(x, (weight.width,), weight.weight, weight.bias, weight.eps)
    scale: torch.Tensor = weight.weight
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + weight.eps) * scale


def _normalise_heads(x: torch.Tensor, weight: NormWeight | None, head_dim: int) -> torch.Tensor:
    """x `[tokens, heads · head_dim]` normalised over each head, or over all when the weight is that wide, split."""
    if weight is not None and weight.width != head_dim:
        x = _normalise(x, weight)
    x = x.reshape(x.shape[0], -1, head_dim)
    return _normalise(x, weight) if weight is not None and weight.width == head_dim else x


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn the first 2·n elements of each head by angles given as cos, sin `[tokens, 1, n]`; the rest passes."""
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        pair = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((pair, rest), dim=-1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
    """One sequence's new queries over its whole context.

    q `[new, kv_heads, group, head_dim]`, k and v `[length, kv_heads, head_dim]`; the queries are the last `new`
    positions. Returns `[new, heads · head_dim]`.
    """
    scores = torch.einsum("nkgd,mkd->kgnm", q, k) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    new, length = q.shape[0], k.shape[0]
    distance = torch.arange(length - new, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    hidden = distance < 0
    if attention.window is not None:
        hidden = hidden | (distance >= attention.window)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    return torch.einsum("kgnm,mkd->nkgd", weights, v).flatten(1)
