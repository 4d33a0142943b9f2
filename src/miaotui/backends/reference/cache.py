"""The paged KV cache of the reference backend: for each layer, tensors `[blocks, 16, kv_heads, head_dim]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from miaotui.backends.ops import BLOCK_SIZE, Attention, CacheSpec, CacheType


@dataclass(frozen=True, eq=False)
class Store:
    """Keys, or values, of one layer; `scale` `[blocks, 16, kv_heads]` float32 is there for int8 only."""

    data: torch.Tensor
    scale: torch.Tensor | None

    def write(self, slots: torch.Tensor, x: torch.Tensor) -> None:
        """Put x `[tokens, kv_heads, head_dim]` at these slots (block · 16 + offset)."""
        if self.scale is not None:
            x, scale = quantise_heads(x)
            self.scale.flatten(0, 1)[slots] = scale
        self.data.flatten(0, 1)[slots] = x.to(self.data.dtype)

    def read(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        """The first `length` positions of these blocks as float32 `[length, kv_heads, head_dim]`."""
        x = self.data[blocks].flatten(0, 1)[:length].float()
        if self.scale is not None:
            x = x * self.scale[blocks].flatten(0, 1)[:length, :, None]
        return x

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        self.data[destination] = self.data[source]
        if self.scale is not None:
            self.scale[destination] = self.scale[source]


class Cache:
    """Keys and values of every layer. Owned by the executor; the engine owns who uses which block."""

    def __init__(self, spec: CacheSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.layers: list[tuple[Store, Store]] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return sum(2 * BLOCK_SIZE * a.kv_heads * _head_bytes(a.head_dim, self.spec.type) for a in self.spec.attentions)

    def allocate(self, blocks: int) -> None:
        self.layers = []  # let go of the old one first
        self.layers = [(self._store(a, blocks), self._store(a, blocks)) for a in self.spec.attentions]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        if not pairs:
            return
        source, destination = (torch.tensor(column, device=self.device) for column in zip(*pairs, strict=True))
        for keys, values in self.layers:
            keys.copy(source, destination)
            values.copy(source, destination)

    def _store(self, attention: Attention, blocks: int) -> Store:
        shape = (blocks, BLOCK_SIZE, attention.kv_heads, attention.head_dim)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[self.spec.type]
        scale = torch.zeros(shape[:3], device=self.device) if self.spec.type == "int8" else None
        return Store(torch.zeros(shape, dtype=kind, device=self.device), scale)


def quantise_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[tokens, heads, head_dim]` as int8 codes (nearest, ties to even) and absmax / 127 for each token and head."""
    scale = x.abs().amax(dim=2) / 127
    codes = torch.round(x / torch.where(scale == 0, 1.0, scale)[..., None])
    return codes, scale


def _head_bytes(head_dim: int, kind: CacheType) -> int:
    return {"fp32": 4 * head_dim, "bf16": 2 * head_dim, "int8": head_dim + 4}[kind]
