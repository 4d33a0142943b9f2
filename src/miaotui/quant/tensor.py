"""Tensors as a checkpoint holds them: dense numbers, grouped codes, or a file's own blocks, untouched.

A reader hands these out one at a time, usually as views of a memory-mapped file; a backend turns each into
its own layout once. `dense32()` is the slow, exact meaning of every kind, and what tests compare against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from miaotui.quant.scheme import QuantScheme

DenseType = Literal["float32", "float16", "bfloat16"]


class Tensor(Protocol):
    """What every stored tensor can say about itself."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes it occupies as stored."""
        ...

    def dense32(self) -> NDArray[np.float32]:
        """The exact values as float32, in `shape`."""
        ...

    def rows(self, index: NDArray[np.int64] | slice) -> Tensor:
        """The same kind of tensor with these rows (dimension 0) in this order."""
        ...

    def matrix(self, index: int) -> Tensor:
        """Matrix `index` of a stack `[n, out, in]` (a layer's experts), as its own tensor `[out, in]`."""
        ...


@dataclass(frozen=True)
class DenseTensor:
    """Floating-point values. `bfloat16` is held as its uint16 bits, since numpy has no such type."""

    type: DenseType
    data: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def dense32(self) -> NDArray[np.float32]:
        if self.type == "bfloat16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):  # a signalling nan is still a nan
            return self.data.astype(np.float32)

    def rows(self, index: NDArray[np.int64] | slice) -> DenseTensor:
        return replace(self, data=self.data[index])

    def matrix(self, index: int) -> DenseTensor:
        return replace(self, data=self.data[index])


@dataclass(frozen=True)
class GroupedTensor:
    """Codes one to a byte, with their scales: the common meaning of every integer format.

    codes `[out, in]` uint8; scale and minimum `[out, groups]` float32, exactly representable in
    `scheme.scale_type`; minimum is None when the scheme is symmetric.
    `perm` (GPTQ's g_idx, activation order): column j of `codes` multiplies input element `perm[j]`; None = identity.
    `by_token`: the checkpoint codes its input to int8 with one scale a token (w8a8); otherwise an engine that codes
    inputs chooses how.
    """

    scheme: QuantScheme
    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    minimum: NDArray[np.float32] | None = None
    perm: NDArray[np.int32] | None = None
    by_token: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        extra = 0 if self.minimum is None else self.minimum.nbytes
        return int(self.codes.size * self.scheme.bits // 8 + self.scale.nbytes + extra)

    def dense32(self) -> NDArray[np.float32]:
        width = self.codes.shape[-1]
        size = self.scheme.group_size or width
        whole = width // size * size
        values = self.codes.astype(np.float32)
        values -= np.float32(self.scheme.zero)
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged file's inf and nan stay what they are
            if whole:
                self._scale_groups(values[..., :whole], slice(0, whole // size), size)
            if whole < width:
                self._scale_groups(values[..., whole:], slice(-1, None), width - whole)
        if self.perm is not None:
            unpermuted = np.empty_like(values)
            unpermuted[..., self.perm] = values
            values = unpermuted
        return values

    def _scale_groups(self, part: NDArray[np.float32], groups: slice, size: int) -> None:
        """In place: the columns `part` that these groups, each `size` wide, cover."""
        view = part.reshape(*part.shape[:-1], part.shape[-1] // size, size)  # splitting one axis never copies
        view *= self.scale[..., groups, None]
        if self.minimum is not None:
            view += self.minimum[..., groups, None]

    def rows(self, index: NDArray[np.int64] | slice) -> GroupedTensor:
        minimum = None if self.minimum is None else self.minimum[index]
        return replace(self, codes=self.codes[index], scale=self.scale[index], minimum=minimum)

    def matrix(self, index: int) -> GroupedTensor:
        minimum = None if self.minimum is None else self.minimum[index]
        return replace(self, codes=self.codes[index], scale=self.scale[index], minimum=minimum)


@dataclass(frozen=True)
class BlockTensor:
    """Rows of a file's own blocks (GGUF's Q4_1, …), not yet unpacked.

    data `[out, bytes per row]` uint8, a view of the file; `shape` is the logical `[out, in]`.
    `quant.pack.grouped(tensor)` gives the same values as a GroupedTensor.
    """

    kind: str
    data: NDArray[np.uint8]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def dense32(self) -> NDArray[np.float32]:
        from miaotui.quant import pack

        return pack.grouped(self).dense32()

    def rows(self, index: NDArray[np.int64] | slice) -> BlockTensor:
        data = self.data[index]
        return replace(self, data=data, shape=(data.shape[0], *self.shape[1:]))

    def matrix(self, index: int) -> BlockTensor:
        return replace(self, data=self.data[index], shape=self.shape[1:])
