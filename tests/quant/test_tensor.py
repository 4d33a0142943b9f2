"""Tensors' exact meaning against one-at-a-time arithmetic: short groups, whole-row groups, order, stacks, rows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from miaotui.quant.rounding import bfloat16_bits
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import DenseTensor, GroupedTensor


def made(shape: tuple[int, ...], size: int | None, symmetric: bool, ordered: bool) -> GroupedTensor:
    rng = np.random.default_rng(0)
    scheme = QuantScheme(4, size, symmetric, "float32")
    groups = (*shape[:-1], scheme.groups(shape[-1]))
    return GroupedTensor(
        scheme,
        rng.integers(0, 16, shape, dtype=np.uint8),
        rng.random(groups, np.float32),
        None if symmetric else rng.standard_normal(groups, np.float32),
        None if ordered else rng.permutation(shape[-1]).astype(np.int32),
    )


def slowly(tensor: GroupedTensor) -> NDArray[np.float32]:
    out = np.empty(tensor.shape, np.float32)
    size = tensor.scheme.group_size or tensor.shape[-1]
    for place in np.ndindex(*tensor.shape):
        *row, column = place
        group = (*row, column // size)
        value = (np.float32(tensor.codes[place]) - np.float32(tensor.scheme.zero)) * tensor.scale[group]
        if tensor.minimum is not None:
            value += tensor.minimum[group]
        out[(*row, column if tensor.perm is None else tensor.perm[column])] = value
    return out


@pytest.mark.parametrize("shape", [(3, 32), (3, 40), (2, 7), (1, 1), (2, 3, 20), (9,)])
@pytest.mark.parametrize("size", [None, 1, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_grouped_values(shape: tuple[int, ...], size: int | None, symmetric: bool, ordered: bool) -> None:
    tensor = made(shape, size, symmetric, ordered)
    np.testing.assert_array_equal(tensor.dense32(), slowly(tensor))


def test_rows_and_matrices() -> None:
    tensor = made((6, 40), 16, False, False)
    for index in (slice(1, 4), np.array([5, 0, 0])):
        np.testing.assert_array_equal(tensor.rows(index).dense32(), tensor.dense32()[index])
    stack = made((3, 4, 40), 16, False, True)
    np.testing.assert_array_equal(stack.matrix(2).dense32(), stack.dense32()[2])


def test_dense_values() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    bits = bfloat16_bits(weight)
    np.testing.assert_array_equal(DenseTensor("bfloat16", bits).dense32().view(np.uint32), bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(DenseTensor("float32", weight).rows(np.array([2, 0])).dense32(), weight[[2, 0]])
    half = DenseTensor("float16", weight.astype(np.float16))
    assert half.nbytes == 24
    np.testing.assert_array_equal(half.matrix(1).dense32(), weight.astype(np.float16)[1].astype(np.float32))
