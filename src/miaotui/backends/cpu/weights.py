"""From stored tensors to the kernels' panels, each in the kind it is stored in: nothing is widened or rounded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.cpu._native import PackedWeight, Pool
from miaotui.quant import pack
from miaotui.quant.tensor import BlockTensor, DenseTensor, GroupedTensor, Tensor

PANEL_KINDS = frozenset({"Q4_0", "Q4_1", "Q8_0"})
"""GGUF kinds that go to panels straight from their blocks; others by way of a GroupedTensor."""

FOLD = 16
"""Groups must be multiples of this for the integer kernels."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One packed matrix `[out, in]`; `perm` as in GroupedTensor."""

    packed: PackedWeight
    perm: NDArray[np.int32] | None = None

    @property
    def height(self) -> int:
        return int(self.packed.shape[0])

    @property
    def width(self) -> int:
        return int(self.packed.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes)


@dataclass(frozen=True, eq=False)
class Linear:
    """Matrices stacked along `out`, and one bias for all of them."""

    parts: tuple[Matrix, ...]
    bias: NDArray[np.float32] | None = None

    @property
    def height(self) -> int:
        return sum(part.height for part in self.parts)

    def part_bias(self, index: int) -> NDArray[np.float32] | None:
        """The bias of one part."""
        if self.bias is None:
            return None
        begin = sum(part.height for part in self.parts[:index])
        return np.ascontiguousarray(self.bias[begin : begin + self.parts[index].height])


def matrix(pool: Pool, tensor: Tensor) -> Matrix:
    """Pack a stored tensor `[out, in]`.

    Integer codes in groups that are no multiple of 16 have no panel layout; they are held as their exact float32
    values instead.
    """
    if isinstance(tensor, BlockTensor):
        if tensor.kind in PANEL_KINDS:
            return Matrix(PackedWeight.gguf(pool, np.ascontiguousarray(tensor.data), tensor.kind, tensor.shape[1]))
        tensor = pack.grouped(tensor)
    if isinstance(tensor, DenseTensor):
        return Matrix(PackedWeight.dense(pool, np.ascontiguousarray(tensor.data), tensor.type))
    assert isinstance(tensor, GroupedTensor)
    width = tensor.shape[1]
    group = tensor.scheme.group_size or width
    if group % FOLD and tensor.scheme.groups(width) > 1:
        return Matrix(PackedWeight.dense(pool, tensor.dense32(), "float32"))
    packed = PackedWeight.grouped(
        pool,
        np.ascontiguousarray(tensor.codes),
        np.ascontiguousarray(tensor.scale),
        None if tensor.minimum is None else np.ascontiguousarray(tensor.minimum),
        tensor.scheme.bits,
        group,
        tensor.scheme.scale_type,
    )
    return Matrix(packed, None if tensor.perm is None else np.ascontiguousarray(tensor.perm, dtype=np.int32))
