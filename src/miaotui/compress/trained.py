"""Solved layers whose scales and norms were trained, and a solution read as the checkpoint that it will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from miaotui.compress.layers import NORM_ROLES
from miaotui.compress.methods.scales import rescaled
from miaotui.compress.places import LINEARS, Model
from miaotui.compress.solved import Solved
from miaotui.compress.types import Coded, Fp8Tensor, LinearScheme, Place
from miaotui.quant import pack
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import DenseTensor, GroupedTensor, Tensor

Ratios = Mapping[Place, torch.Tensor]
"""Logarithms of what a linear's scales `[out, groups]`, or a norm's weight `[width]`, are multiplied by."""


@dataclass(frozen=True, eq=False)
class Trained(Solved):
    """`Solved` times what was learnt. `free`: see `methods.scales.rescaled`."""

    ratios: Ratios
    free: bool

    def places(self) -> Sequence[Place]:
        return list(dict.fromkeys((*super().places(), *self.ratios)))

    def tensor(self, place: Place) -> Coded:
        ratio = self.ratios.get(place)
        if ratio is None:
            return super().tensor(place)
        ratio = ratio.detach()
        if ratio.dim() == 1:
            return DenseTensor("float32", (self._norm(place) * ratio.exp()).numpy())
        return rescaled(self.before(place), ratio, self._weights(place), free=self.free)

    def before(self, place: Place) -> GroupedTensor:
        """A linear as it was solved."""
        tensor = super().tensor(place)
        assert isinstance(tensor, GroupedTensor), f"{place} is not what its scheme says"
        return tensor

    def _norm(self, place: Place) -> torch.Tensor:
        found = super().tensor(place) if place in self._kinds else self._original.values(place)
        assert not isinstance(found, Fp8Tensor), "a norm is not coded"
        return torch.from_numpy(np.array(found.dense32()))

    @cached_property
    def _original(self) -> Model:
        return Model(self.source, self.spec, self.names)

    def _weights(self, place: Place) -> QuantScheme:
        weights = self.schemes[place].weights
        assert weights is not None
        return weights


def trainable(solved: Solved) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Places that can be trained, with the shape of what is learnt: integer linears, and all norms."""
    model = Model(solved.source, solved.spec, solved.names)
    for place in model.places():
        scheme = solved.schemes.get(place, LinearScheme())
        if place.bias:
            continue
        if place.role in LINEARS and scheme.weights is not None:
            out, width = model.stored(place).shape
            yield place, (out, scheme.weights.groups(width))
        elif place.role in (*NORM_ROLES, "norm"):
            yield place, model.stored(place).shape


@dataclass(frozen=True, eq=False)
class SolvedModel(Model):
    """A solution, read as the checkpoint that it will be."""

    solution: Solved

    @classmethod
    def of(cls, solution: Solved) -> SolvedModel:
        return cls(solution.source, solution.spec, solution.names, solution)

    @cached_property
    def _changed(self) -> frozenset[Place]:
        return frozenset(self.solution.places())

    def values(self, place: Place) -> Tensor:
        if place not in self._changed:
            return super().values(place)
        tensor = self.solution.tensor(place)
        if isinstance(tensor, Fp8Tensor):
            return DenseTensor("float32", pack.e4m3(tensor.data) * tensor.scale)
        return tensor

    @property
    def head(self) -> Place:
        """Where the matrix is that makes logits: a rotated model's head is its own."""
        own = Place("head") in self._changed or not self.spec.tied_head
        return Place("head") if own else Place("embedding")
