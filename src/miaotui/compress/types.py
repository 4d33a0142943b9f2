"""What the rooms of compression hand to each other: places in a model, statistics, layers, and the solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.base import Checkpoint
from miaotui.model.names import Names
from miaotui.model.spec import LayerSpec, ModelSpec
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import Tensor

if TYPE_CHECKING:
    import torch

InputScheme = Literal["none", "int8-dynamic", "int8-static", "fp8-dynamic", "fp8-static"]
"""What becomes of a linear's inputs: nothing; codes with a scale of each token; codes with one scale known before."""

KvScheme = Literal["none", "int8", "fp8"]


@dataclass(frozen=True)
class LinearScheme:
    """How one linear is stored and multiplied. Exactly one of `weights` and `fp8`, or neither: it stays as it is.

    fp8: weights as e4m3 with one scale of each output row.
    """

    weights: QuantScheme | None = None
    fp8: bool = False
    inputs: InputScheme = "none"

    @property
    def kept(self) -> bool:
        return self.weights is None and not self.fp8

    def bits(self, width: int) -> float:
        """Bits that one weight takes on average, scales and minima included; 16 for one that is kept."""
        if self.weights is None:
            return 8 + 32 / width if self.fp8 else 16.0
        number = 32 if self.weights.scale_type == "float32" else 16
        each = number if self.weights.symmetric else number + self.weights.bits
        return self.weights.bits + each * self.weights.groups(width) / width


KEPT = LinearScheme()


@dataclass(frozen=True, order=True)
class Place:
    """Where a tensor stands in a model, whatever its file calls it.

    role: one of `model.names` (`qkv`, `out`, `mlp_in`, `mlp_out`, `expert_in`, `expert_out`, `router`, the norms), or
    `embedding`, `norm`, `head` with layer −1. part: which of the role's stems (q, k, v; gate, up). Where a family
    stores all of a role in one matrix, that matrix is part 0.
    """

    role: str
    layer: int = -1
    part: int = 0
    expert: int | None = None
    bias: bool = False

    def name(self, names: Names) -> str:
        """The tensor's name in a file with these names."""
        suffix = ".bias" if self.bias else ".weight"
        if self.layer < 0:
            return {"embedding": names.embedding, "norm": names.norm, "head": names.head}[self.role] + suffix
        return names.stems(self.role, self.layer, self.expert)[self.part] + suffix


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What calibration learnt of a linear's inputs X `[rows, in]`, all float32.

    moment: XᵀX `[in, in]`; mean_abs, low, high: mean of |x|, least and largest x of each input `[in]`.
    """

    moment: torch.Tensor
    mean_abs: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    rows: int


@dataclass(eq=False)
class LinearGroup:
    """The matrices of one role, which read the same inputs: q, k and v; gate and up; o; down; those of an expert.

    weights: `[out_i, in]` float32; q and k with the two halves of a head one after the other, also from GGUF.
    biases: None, or one `[out_i]` for each weight. schemes: one for each weight. `statistics` is None where no
    calibration was wanted, or where an expert saw no token.
    """

    role: str
    places: tuple[Place, ...]
    weights: list[torch.Tensor]
    biases: list[torch.Tensor] | None
    schemes: tuple[LinearScheme, ...]
    statistics: InputStatistics | None = None


@dataclass(eq=False)
class Layer:
    """One decoder layer, as torch tensors that a method may replace in place.

    groups by role (`expert_in.3` for an expert's); norms by role, effective (any offset added). key_peaks, value_peaks:
    largest |x| of each channel of the cache in calibration. changed: places, beside the coded linears, that a method
    gave new values.
    """

    index: int
    spec: LayerSpec
    groups: dict[str, LinearGroup]
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    norm_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    router: torch.Tensor | None = None
    key_peaks: torch.Tensor | None = None
    value_peaks: torch.Tensor | None = None
    changed: set[Place] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Fp8Tensor:
    """A weight as e4m3 bytes `[out, in]` uint8 with a float32 scale of each row `[out, 1]`."""

    data: NDArray[np.uint8]
    scale: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


Coded = Tensor | Fp8Tensor


class Solution(Protocol):
    """What compression made of a model, read from disk one tensor at a time. Everything else is the original's.

    Values are effective: q and k rows in halves, norms with any offset added. `schemes` has every linear of every
    layer (and the embedding and head where they are coded). A writer maps places to the names of its format.
    """

    @property
    def source(self) -> Checkpoint: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def names(self) -> Names: ...
    @property
    def schemes(self) -> Mapping[Place, LinearScheme]: ...
    @property
    def input_scales(self) -> Mapping[Place, float]:
        """Of linears with static inputs: x ≈ scale · code."""
        ...

    @property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        """Of each layer's keys and values, where the cache is to be coded."""
        ...

    @property
    def kv_scheme(self) -> KvScheme: ...

    def places(self) -> Sequence[Place]:
        """All that changed: coded weights, folded norms and biases."""
        ...

    def tensor(self, place: Place) -> Coded:
        """A changed tensor; GroupedTensor or Fp8Tensor where its scheme says so, else DenseTensor float32."""
        ...
