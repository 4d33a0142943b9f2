"""Random weights as they are stored: their kind, their size, their spread."""

from __future__ import annotations

import numpy as np
import pytest
from miaotui.backends.cpu._native import Heap, Pool

from miaotui.backends.cpu.weights import matrix
from miaotui.errors import UsageError
from miaotui.quant import pack
from miaotui.quant.dummy import Storage
from miaotui.quant.rounding import to_scale_type
from miaotui.quant.tensor import BlockTensor, DenseTensor, GroupedTensor

NAMES = ["bf16", "fp16", "fp32", *map(str.lower, pack.KINDS), "w4g32-sym", "w4g64-asym", "w8g128-sym", "w8-channel"]


@pytest.mark.parametrize("name", NAMES)
def test_values_keep_an_activation_its_size(name: str) -> None:
    tensor = Storage.parse(name).matrix("blk.0.ffn_up.weight", 96, 1024)
    values = tensor.dense32()
    assert values.shape == tensor.shape == (96, 1024)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.2 / 1024**0.5
    assert values.std() == pytest.approx(1024**-0.5, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_is_known_beforehand(name: str) -> None:
    storage = Storage.parse(name)
    packed = matrix(Pool(1), Heap(), storage.matrix("x", 64, 512))
    assert storage.nbytes(64, 512) == pytest.approx(packed.nbytes, rel=0.01)


def test_kinds() -> None:
    assert isinstance(Storage.parse("Q4_1").matrix("x", 2, 64), BlockTensor)
    assert isinstance(Storage.parse("q4_k").matrix("x", 2, 256), GroupedTensor)
    assert Storage.parse("w4g32").name == "w4g32-sym"
    assert [Storage.parse(name).tables.name for name in ("q4_k", "w8-channel", "fp32")] == ["q8_0", "bf16", "fp32"]
    odd = Storage.parse("q4_0").matrix("x", 3, 100)
    assert isinstance(odd, DenseTensor)
    assert odd.nbytes == Storage.parse("q4_0").nbytes(3, 100) == 3 * 100 * 2


def test_a_name_is_a_seed() -> None:
    storage = Storage.parse("w4g32-asym")
    one, again, other = (storage.matrix(name, 8, 64).dense32() for name in ("a", "a", "b"))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])


def test_scales_are_of_their_type() -> None:
    tensor = Storage.parse("w4g32-asym").matrix("x", 16, 320)
    assert isinstance(tensor, GroupedTensor)
    assert tensor.minimum is not None
    for values in (tensor.scale, tensor.minimum):
        assert np.array_equal(values, to_scale_type(values, "float16"))


@pytest.mark.parametrize("name", ["", "int4", "w5g32", "w4g20", "w4g0", "q9_0", "w4"])
def test_what_cannot_be_made_up(name: str) -> None:
    with pytest.raises(UsageError, match="no kind of weights"):
        Storage.parse(name)
