"""From stored tensors to the kernels' panels, each in the kind it is stored in: nothing is widened or rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.cpu._native import Heap, PackedWeight, Pool, Screen
from miaotui.quant import pack
from miaotui.quant.tensor import BlockTensor, DenseTensor, GroupedTensor, Tensor

PANEL_KINDS = frozenset({"Q4_0", "Q4_1", "Q8_0"})
"""GGUF kinds that go to panels straight from their blocks; others by way of a GroupedTensor."""

INTEGER = frozenset({"int4", "int8"})

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

    @property
    def in_groups(self) -> bool:
        """Whether it holds integers whose input is quantised in groups of neighbours."""
        return self.packed.code in INTEGER and not self.packed.by_token


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


class WeightStore(Protocol):
    """Packed weights kept from an earlier load, in the order in which they are asked for."""

    def take(self, description: str) -> PackedWeight | None:
        """The next weight, if one is kept and was made of a tensor that `describe` calls the same."""
        ...

    def put(self, description: str, weight: PackedWeight) -> None:
        """Keep a weight that was just packed."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether all that an earlier load kept has been taken: no more can be kept beside it."""
        ...


def describe(tensor: Tensor) -> str:
    """What decides how a tensor is packed, its values aside."""
    shape = "x".join(map(str, tensor.shape))
    match tensor:
        case BlockTensor():
            return f"{tensor.kind} {shape}"
        case DenseTensor():
            return f"{tensor.type} {shape}"
        case GroupedTensor():
            return f"{tensor.scheme} {tensor.scheme.scale_type} {shape}{' by token' if tensor.by_token else ''}"
    raise AssertionError(f"no packing for {type(tensor).__name__}")


def stored_matrix(pool: Pool, heap: Heap, tensor: Tensor, store: WeightStore | None) -> Matrix:
    """`matrix`, by way of the store when there is one: what it holds is neither read nor packed again."""
    if store is None:
        return matrix(pool, heap, tensor)
    kept = store.take(describe(tensor))
    if kept is not None:
        return Matrix(kept, _order(tensor) if kept.code in INTEGER else None)
    made = matrix(pool, heap, tensor)
    store.put(describe(tensor), made.packed)
    return made


def screen_of(pool: Pool, head: PackedWeight, isa: str, store: WeightStore | None) -> Screen:
    """The head's screen, by way of the store where there is one that keeps it."""
    heap = Heap()
    if store is None or store.exhausted:
        return Screen.of(pool, heap, head, isa)
    names = [f"{part} of the screen of {head.code} {head.shape[0]}x{head.shape[1]}" for part in ("rows", "facts")]
    coarse, facts = (store.take(name) for name in names)
    if coarse is not None and facts is not None:
        return Screen.again(coarse, facts)
    made = Screen.of(pool, heap, head, isa)
    store.put(names[0], made.coarse)
    store.put(names[1], made.facts)
    return made


def _order(tensor: Tensor) -> NDArray[np.int32] | None:
    if not isinstance(tensor, GroupedTensor) or tensor.perm is None:
        return None
    return np.ascontiguousarray(tensor.perm, dtype=np.int32)


def matrix(pool: Pool, heap: Heap, tensor: Tensor) -> Matrix:
    """Pack a stored tensor `[out, in]` into the heap.

    Integer codes in groups that are no multiple of 16 have no panel layout; they are held as their exact float32
    values instead.
    """
    if isinstance(tensor, BlockTensor):
        if tensor.kind in PANEL_KINDS:
            return Matrix(
                PackedWeight.gguf(pool, heap, np.ascontiguousarray(tensor.data), tensor.kind, tensor.shape[1])
            )
        tensor = pack.grouped(tensor)
    if isinstance(tensor, DenseTensor):
        return Matrix(PackedWeight.dense(pool, heap, np.ascontiguousarray(tensor.data), tensor.type))
    assert isinstance(tensor, GroupedTensor)
    width = tensor.shape[1]
    group = tensor.scheme.group_size or width
    if group % FOLD and tensor.scheme.groups(width) > 1:
        return Matrix(PackedWeight.dense(pool, heap, tensor.dense32(), "float32"))  # in the input's own order
    packed = PackedWeight.grouped(
        pool,
        heap,
        np.ascontiguousarray(tensor.codes),
        np.ascontiguousarray(tensor.scale),
        None if tensor.minimum is None else np.ascontiguousarray(tensor.minimum),
        tensor.scheme.bits,
        group,
        tensor.scheme.scale_type,
        tensor.by_token,
    )
    return Matrix(packed, _order(tensor))
