"""Sparse matrices as compressed-tensors' sparse-bitmask has them: a bit for each element, and those that are not 0.

In 16 bits a matrix takes 1/16 + (1 − sparsity) of its dense bytes, and 8 more a row: less from 1/16 sparsity on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Bitmask:
    """values `[kept]` row by row, of any type; mask `[out, ceil(in / 8)]` uint8, the first element in the lowest bit.

    offsets `[out]` int64: where each row begins in the values.
    """

    values: NDArray[Any]
    mask: NDArray[np.uint8]
    offsets: NDArray[np.int64]


def to_bitmask(dense: NDArray[Any], kept: NDArray[np.bool_]) -> Bitmask:
    """The elements of a matrix `[out, in]` that are `kept`; the others are to be 0."""
    counts = kept.sum(axis=1, dtype=np.int64)
    mask = np.packbits(kept, axis=1, bitorder="little")
    return Bitmask(dense[kept], mask, np.cumsum(counts, dtype=np.int64) - counts)


def from_bitmask(sparse: Bitmask, width: int) -> NDArray[Any]:
    """The dense matrix `[out, width]`. Raises ValueError where mask, values and offsets do not fit together."""
    rows = len(sparse.mask)
    kept = np.unpackbits(sparse.mask, axis=1, bitorder="little")
    if kept[:, width:].any():
        raise ValueError("its mask has bits beyond the row")
    kept = kept[:, :width].view(np.bool_)
    counts = kept.sum(axis=1, dtype=np.int64)
    if counts.sum() != len(sparse.values):
        raise ValueError(f"its mask has {counts.sum()} bits for {len(sparse.values)} values")
    if not np.array_equal(np.cumsum(counts) - counts, sparse.offsets):
        raise ValueError("its row offsets are not those of its mask")
    dense = np.zeros((rows, width), sparse.values.dtype)
    dense[kept] = sparse.values
    return dense
