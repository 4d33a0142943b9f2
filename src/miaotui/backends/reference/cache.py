"""The paged KV cache of the reference backend: for each layer, tensors `[blocks, 16, kv_heads, head_dim]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

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

    def read(self, block: int) -> NDArray[np.uint8]:
        """One block over all layers as bytes."""
        return np.concatenate([part.view(torch.uint8).flatten().cpu().numpy() for part in self._parts(block)])

    def write(self, block: int, content: NDArray[np.uint8]) -> None:
        """Fill one block with what `read` gave."""
        at = 0
        for part in self._parts(block):
            size = part.numel() * part.element_size()
            stored = torch.from_numpy(content[at : at + size].copy()).view(part.dtype).view(part.shape)
            part.copy_(stored)
            at += size

    def _parts(self, block: int) -> Iterator[torch.Tensor]:
        """A block's views into every tensor of the cache."""
        for store in (store for layer in self.layers for store in layer):
            yield store.data[block]
            if store.scale is not None:
                yield store.scale[block]

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
