"""All places of a model, and what a checkpoint holds at each, the same for every format.

Values are effective: rows of q and k with the two halves of a head one after the other, norms with their offset added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.types import Place, Solution
from miaotui.errors import CheckpointError
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.model.weights import halves
from miaotui.quant.tensor import DenseTensor, Tensor

NORMS = frozenset({"norm", "attention_norm", "attention_post_norm", "q_norm", "k_norm", "mlp_norm", "mlp_post_norm"})
LINEARS = frozenset({"qkv", "out", "mlp_in", "mlp_out", "expert_in", "expert_out"})
"""Roles that compression codes; a router is kept."""

_STACKS = {"expert_in": "experts_in", "expert_out": "experts_out"}


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint with its spec and names, read by place."""

    checkpoint: Checkpoint
    spec: ModelSpec
    names: Names

    @cached_property
    def present(self) -> frozenset[str]:
        return frozenset(self.checkpoint.names())

    def name(self, place: Place) -> str:
        """Where a place's values are: its own tensor, or the stack of all experts."""
        name = place.name(self.names) if self._named(place) else ""
        if name in self.present or place.role not in _STACKS:
            return name
        return self.names.stems(_STACKS[place.role], place.layer)[place.part] + ".weight"

    def _named(self, place: Place) -> bool:
        return place.layer < 0 or bool(self.names.stems(place.role, place.layer, place.expert))

    def stored(self, place: Place) -> Tensor:
        """What the file has at a place, as it has it but for the order of rows: its own kind of tensor."""
        name = self.name(place)
        tensor = self.checkpoint.tensor(name)
        if place.expert is not None and len(tensor.shape) == 3:
            return tensor.matrix(place.expert)
        order = row_order(self.spec, self.names, place)
        return tensor if order is None else tensor.rows(order)

    def values(self, place: Place) -> Tensor:
        """The effective tensor."""
        tensor = self.stored(place)
        if place.role in NORMS and not place.bias and self.spec.norm_offset:
            return DenseTensor("float32", tensor.dense32() + np.float32(self.spec.norm_offset))
        return tensor

    def places(self) -> Iterator[Place]:
        """Every place that the spec has and the file fills, biases after their weights.

        Raises CheckpointError for a weight that is missing.
        """
        for place in self._weights():
            if self.name(place) not in self.present:
                raise CheckpointError(
                    f"{self.checkpoint.path} lacks the tensor {self.name(place)!r:.100}.", "Download it again."
                )
            yield place
            bias = Place(place.role, place.layer, place.part, place.expert, bias=True)
            if self._named(place) and bias.name(self.names) in self.present:
                yield bias

    def _weights(self) -> Iterator[Place]:
        yield Place("embedding")
        for index, layer in enumerate(self.spec.layers):
            routed = layer.experts is not None
            for role in _roles(self.spec, routed):
                for expert in range(layer.experts.count) if layer.experts and role in _STACKS else (None,):
                    for part in range(self._parts(role, index)):
                        yield Place(role, index, part, expert)
        yield Place("norm")
        if not self.spec.tied_head:
            yield Place("head")

    def _parts(self, role: str, layer: int) -> int:
        stems = self.names.stems(role, layer, 0) or self.names.stems(_STACKS.get(role, role), layer)
        return len(stems)


def _roles(spec: ModelSpec, routed: bool) -> list[str]:
    """The roles of one layer."""
    roles = ["attention_norm"] if spec.pre_norm else []
    roles += ["qkv", *(("q_norm", "k_norm") if spec.qk_norm else ()), "out"]
    roles += ["attention_post_norm"] if spec.post_norm else []
    roles += ["mlp_norm"] if spec.pre_norm else []
    roles += ["router", "expert_in", "expert_out"] if routed else ["mlp_in", "mlp_out"]
    return roles + (["mlp_post_norm"] if spec.post_norm else [])


def row_order(spec: ModelSpec, names: Names, place: Place) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    """Which row of the file is each row of q or k, where llama.cpp's converter permutes them; None: as they come."""
    if not names.interleaved or place.role != "qkv" or place.part == 2:
        return None
    attention = spec.layers[place.layer].attention
    return halves(attention.heads if place.part == 0 else attention.kv_heads, attention.head_dim)


def all_places(solution: Solution) -> list[Place]:
    """Every place of an artefact: the original's, and a head that was tied and is now its own."""
    found = list(Model(solution.source, solution.spec, solution.names).places())
    known = set(found)
    return found + [place for place in solution.places() if place not in known]
