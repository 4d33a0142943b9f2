"""The op contract over whole windows of tokens, in PyTorch: no cache, differentiable, its linears can be listened to.

This is how compression runs the one decoder (`model.decoder`): a buffer is `[windows · length, width]`, every window
attends to itself alone. Calibration listens to what goes into the linears; training gives weights that require grad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from miaotui.backends.ops import Activation, Attention, ExpertsWeight, NormWeight, Rope
from miaotui.backends.reference.ops import ACTIVATIONS, routed
from miaotui.quant.tensor import Tensor

Listen = Callable[[str, torch.Tensor], None]
"""Told a linear's key and its inputs `[rows, in]`; `keys.N` and `values.N` with what layer N's cache would hold."""

Inputs = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
"""What becomes of a linear's inputs, by its key: int8 or fp8 activations."""


@dataclass(frozen=True, eq=False)
class WindowLinear:
    """Matrices `[out_i, in]` that share their inputs, stacked along `out`; `key` is what they are called in a model."""

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...] | None = None
    key: str = ""


class WindowOps:
    """`Ops` over windows of `length` tokens. `tokens` `[windows, length]` are what `embed` looks up.

    product: the type that matrices are multiplied in; everything else is float32.
    rows: the rows that `select_rows` takes (all, where None).
    """

    def __init__(
        self,
        length: int,
        *,
        tokens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        product: torch.dtype = torch.float32,
        listen: Listen | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.length = length
        self.tokens = tokens
        self.rows = rows
        self.product = product
        self.listen = listen
        self.inputs = inputs or {}
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # -- weights -----------------------------------------------------------------------------------------
    def prepare_linear(self, parts: Sequence[Tensor], bias: NDArray[np.float32] | None = None) -> WindowLinear:
        weights = tuple(torch.from_numpy(part.dense32()) for part in parts)
        if bias is None:
            return WindowLinear(weights)
        split = torch.split(torch.from_numpy(bias.copy()), [len(weight) for weight in weights])
        return WindowLinear(weights, tuple(split))

    def prepare_embedding(self, table: Tensor) -> WindowLinear:
        return self.prepare_linear([table])

    def prepare_norm(
        self,
        weight: NDArray[np.float32],
        eps: float,
        *,
        bias: NDArray[np.float32] | None = None,
        kind: Literal["rms", "layer"] = "rms",
    ) -> NormWeight:
        offset = None if bias is None else torch.from_numpy(bias.copy())
        return NormWeight(torch.from_numpy(weight.copy()), offset, eps, weight.shape[0], kind)

    # -- the step ----------------------------------------------------------------------------------------
    def embed(self, table: WindowLinear, *, scale: float = 1.0) -> torch.Tensor:
        assert self.tokens is not None, "windows without tokens have no embedding"
        return F.embedding(self.tokens.flatten().long(), table.weights[0]).float() * scale

    def norm(self, x: torch.Tensor, weight: NormWeight, *, add: torch.Tensor | None = None) -> torch.Tensor:
        y = _normalise(x, weight)
        return y if add is None else add + y

    def linear(
        self, x: torch.Tensor, weight: WindowLinear, *, add: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        y = self._product(x, weight)
        y = y if scale == 1.0 else y * scale
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
        a = attention
        widths = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
        q, k, v = torch.split(qkv, widths, dim=1)
        q, k = self._heads(q, q_norm, a.head_dim), self._heads(k, k_norm, a.head_dim)
        if a.rope is not None:
            q, k = self._turn(q, a.rope), self._turn(k, a.rope)
        if self.listen is not None:
            self.listen(f"keys.{layer}", k.reshape(len(qkv), -1))
            self.listen(f"values.{layer}", v)
        self._kept = k, v.reshape(k.shape)
        return q.reshape(len(qkv), -1)

    def attention(self, q: torch.Tensor, layer: int, attention: Attention) -> torch.Tensor:
        assert self._kept is not None, "attention comes after rope_and_cache"
        (keys, values), self._kept = self._kept, None
        shared = attention.heads // attention.kv_heads
        queries = q.view(-1, self.length, attention.heads, attention.head_dim).transpose(1, 2)
        k, v = (x.transpose(1, 2).repeat_interleave(shared, dim=1) for x in (keys, values))
        out = _attend(queries.to(self.product), k.to(self.product), v.to(self.product), attention)
        return out.transpose(1, 2).reshape(len(q), -1).float()

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
        router: WindowLinear = weight.router
        probability = torch.softmax(x @ router.weights[0].T, dim=1)
        out = torch.zeros_like(x) if add is None else add
        for expert, rows, share in routed(probability, top_k, normalise):
            y = self.gated(self._product(x[rows], weight.gate_up[expert]), activation)
            y = self._product(y, weight.down[expert])
            out = out.index_add(0, rows, y * share)
        return out

    def select_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rows is None else x[self.rows]

    def logits(
        self, x: torch.Tensor, head: WindowLinear, *, scale: float = 1.0, softcap: float | None = None
    ) -> torch.Tensor:
        y = self._product(x, head)
        y = y if scale == 1.0 else y * scale
        return y if softcap is None else softcap * torch.tanh(y / softcap)

    # -- helpers -----------------------------------------------------------------------------------------
    def _product(self, x: torch.Tensor, linear: WindowLinear) -> torch.Tensor:
        if self.listen is not None:
            self.listen(linear.key, x)
        if linear.key in self.inputs:
            x = self.inputs[linear.key](x)
        x = x.to(self.product)
        columns = [(x @ weight.to(self.product).T).float() for weight in linear.weights]
        if linear.biases is not None:
            columns = [column + bias for column, bias in zip(columns, linear.biases, strict=True)]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def _heads(self, x: torch.Tensor, weight: NormWeight | None, head_dim: int) -> torch.Tensor:
        """x `[rows, heads · head_dim]` as `[windows, length, heads, head_dim]`, normalised if a weight is given."""
        if weight is not None and weight.width != head_dim:
            x = _normalise(x, weight)
        x = x.reshape(-1, self.length, x.shape[1] // head_dim, head_dim)
        return _normalise(x, weight) if weight is not None and weight.width == head_dim else x

    def _turn(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Rotate x `[windows, length, heads, head_dim]` by its positions in the windows."""
        if id(rope) not in self._turns:
            angle = torch.arange(self.length)[:, None].float() * torch.from_numpy(rope.inv_freq)
            turn = ((angle.cos() * rope.factor)[:, None], (angle.sin() * rope.factor)[:, None])
            self._turns[id(rope)] = turn[0].to(x.device), turn[1].to(x.device)
        cos, sin = self._turns[id(rope)]
        turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        if rope.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            pair = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            pair = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((pair, rest), dim=-1) if rest.shape[-1] else pair


def _normalise(x: torch.Tensor, weight: NormWeight) -> torch.Tensor:
    scale: torch.Tensor = weight.weight
    if weight.kind == "layer":
        return F.layer_norm(x, (weight.width,), scale, weight.bias, weight.eps)
    return F.rms_norm(x, (weight.width,), scale, weight.eps)


TILE = 128
"""Queries that `_tiled` takes together."""


def _tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention, a tile of queries at a time against the keys so far: on a CPU nearly twice as fast in bfloat16
    as PyTorch's own. The softmax is in float32.
    """
    windows, heads, length, width = q.shape
    q, k, v = (x.reshape(windows * heads, length, width) for x in (q, k, v))
    future = torch.full((TILE, TILE), float("-inf")).triu(1)
    tiles = []
    for start in range(0, length, TILE):
        end = min(start + TILE, length)
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).float() * scale
        scores[:, :, start:] += future[: end - start, : end - start]
        tiles.append(torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v[:, :end]))
    return torch.cat(tiles, dim=1).view(windows, heads, length, width)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Causal softmax attention of q, k, v `[windows, heads, length, head_dim]`, within a sliding window if any."""
    if attention.window is None and attention.softcap is None:
        if q.dtype == torch.bfloat16 and not q.is_cuda:
            return _tiled(q, k, v, attention.scale)
        out: torch.Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale)
        return out
    at = torch.arange(q.shape[2], device=q.device)
    distance = at[:, None] - at
    seen = distance >= 0
    if attention.window is not None:
        seen &= distance < attention.window
    if attention.softcap is None:
        masked: torch.Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=attention.scale)
        return masked
    scores = (q @ k.transpose(2, 3)).float() * attention.scale
    scores = attention.softcap * torch.tanh(scores / attention.softcap)
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1).to(v.dtype) @ v
