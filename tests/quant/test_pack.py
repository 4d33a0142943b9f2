"""Block and word layouts against the `gguf` package and against direct, slow definitions."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from miaotui.quant import pack
from miaotui.quant.rounding import round_to_nearest
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import BlockTensor, GroupedTensor

BOTH_WAYS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def random_blocks(kind: str, rows: int, count: int, seed: int = 0) -> BlockTensor:
    """Random bytes; a scale that comes out as inf or nan is made finite, as any real file's is."""
    spec = pack.KINDS[kind]
    data = np.random.default_rng(seed).integers(0, 256, (rows, count, spec.block_bytes), dtype=np.uint8)
    starts = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2))
    for start in starts:
        data[..., start + 1] &= 0xBF  # clears the exponent's top bit
    return BlockTensor(kind, data.reshape(rows, -1), (rows, count * spec.block_size))


@pytest.mark.parametrize("kind", list(pack.KINDS))
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 5), (17, 2)])
def test_random_bytes_mean_what_gguf_says_bit_for_bit(kind: str, rows: int, count: int) -> None:
    tensor = random_blocks(kind, rows, count, seed=rows)
    expected = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(tensor.dense32(), expected)
    unpacked = pack.grouped(tensor)
    assert unpacked.shape == tensor.shape
    assert unpacked.codes.max() < 1 << unpacked.scheme.bits


@pytest.mark.parametrize("kind", BOTH_WAYS)
def test_what_gguf_quantised_is_read_exactly(kind: str) -> None:
    weight = np.random.default_rng(1).standard_normal((6, 96), np.float32)
    data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    tensor = BlockTensor(kind, data, weight.shape)
    np.testing.assert_array_equal(tensor.dense32(), gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", list(pack.KINDS))
def test_sizes_are_ggufs(kind: str) -> None:
    spec = pack.KINDS[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (spec.block_size, spec.block_bytes)


@pytest.mark.parametrize("kind", list(pack.KINDS))
def test_scales_fit_the_scale_type(kind: str) -> None:
    unpacked = pack.grouped(random_blocks(kind, 4, 2))
    if unpacked.scheme.scale_type == "float16":
        np.testing.assert_array_equal(unpacked.scale.astype(np.float16).astype(np.float32), unpacked.scale)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_undoes_grouped(kind: str) -> None:
    tensor = random_blocks(kind, 5, 3)
    again = pack.blocks(kind, pack.grouped(tensor))
    np.testing.assert_array_equal(again.data, tensor.data)
    assert again.shape == tensor.shape


def test_blocks_refuses_another_scheme() -> None:
    tensor = round_to_nearest(np.ones((2, 64), np.float32), QuantScheme(4, 64, True))
    with pytest.raises(ValueError, match="is not Q4_0"):
        pack.blocks("Q4_0", tensor)


@pytest.mark.parametrize("kind", list(pack.KINDS))
def test_rows_and_matrices_of_blocks(kind: str) -> None:
    tensor = random_blocks(kind, 6, 2)
    order = np.array([3, 0, 5])
    np.testing.assert_array_equal(tensor.rows(order).dense32(), tensor.dense32()[order])
    stack = BlockTensor(kind, tensor.data.reshape(2, 3, -1), (2, 3, tensor.shape[1]))
    np.testing.assert_array_equal(stack.dense32(), tensor.dense32().reshape(2, 3, -1))
    np.testing.assert_array_equal(stack.matrix(1).dense32(), tensor.dense32()[3:])
    np.testing.assert_array_equal(pack.grouped(stack).matrix(0).dense32(), tensor.dense32()[:3])


# -- int32 words ---------------------------------------------------------------------------------------------
def slow_pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """One code at a time into a Python integer."""
    words = -(-codes.shape[1] * bits // 32)
    out = np.zeros((codes.shape[0], words), np.uint32)
    for r, row in enumerate(codes.tolist()):
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        for w in range(words):
            out[r, w] = whole >> (32 * w) & 0xFFFFFFFF
    return out.view(np.int32)


@pytest.mark.parametrize("bits", pack.WORD_BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 16, 33, 64])
def test_words_both_ways(bits: int, width: int) -> None:
    codes = np.random.default_rng(width).integers(0, 1 << bits, (3, width), dtype=np.uint8)
    words = pack.pack_words(codes, bits)
    np.testing.assert_array_equal(words, slow_pack(codes, bits))
    np.testing.assert_array_equal(pack.unpack_words(words, bits, width), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(8, 64), (5, 96), (3, 40)])
def test_compressed_tensors_both_ways_and_against_the_package(symmetric: bool, shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight = np.random.default_rng(2).standard_normal(shape, np.float32)
    scheme = QuantScheme(4, 32, symmetric)
    tensor = round_to_nearest(weight, scheme)
    packed, zeros = pack.compressed_words(tensor)
    signed = torch.from_numpy(tensor.codes.astype(np.int8) - 8)
    np.testing.assert_array_equal(packed, pack_to_int32(signed, 4).numpy())
    if symmetric:
        assert zeros is None
    else:
        points = torch.from_numpy(pack.zero_points(tensor).astype(np.int8) - 8)
        np.testing.assert_array_equal(zeros, pack_to_int32(points, 4, packed_dim=0).numpy())
    again = pack.compressed_int4(packed, tensor.scale, zeros, scheme, shape[1])
    np.testing.assert_array_equal(again.dense32(), tensor.dense32())
    assert again.scheme.symmetric == symmetric


def test_compressed_words_restores_the_order_of_columns() -> None:
    tensor = round_to_nearest(np.random.default_rng(3).standard_normal((4, 64), np.float32), QuantScheme(4, 32, True))
    perm = np.random.default_rng(4).permutation(64).astype(np.int32)
    shuffled = GroupedTensor(tensor.scheme, tensor.codes, tensor.scale, None, perm)
    packed, _ = pack.compressed_words(shuffled)
    again = pack.compressed_int4(packed, tensor.scale, None, tensor.scheme, 64, perm)
    np.testing.assert_array_equal(again.dense32(), shuffled.dense32())


def test_minima_that_are_no_zero_points_are_refused() -> None:
    tensor = round_to_nearest(
        np.random.default_rng(5).standard_normal((2, 64), np.float32) + 9, QuantScheme(4, 32, False), "free"
    )
    with pytest.raises(ValueError, match="whole multiples"):
        pack.compressed_words(tensor)


def grouped_oracle(
    codes: NDArray[np.uint8], zeros: NDArray[np.int32], scale: NDArray[np.float32], group: NDArray[np.int64]
) -> NDArray[np.float32]:
    """(q − zero) · scale element by element; group[j] is column j's; zeros and scale `[groups, out]`."""
    out = np.empty(codes.shape, np.float32)
    for o, j in np.ndindex(*codes.shape):
        g = group[j]
        out[o, j] = (np.float32(codes[o, j]) - np.float32(zeros[g, o])) * scale[g, o]
    return out


def halves(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    return (rng.random(shape, np.float32) + 0.01).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("reorder", [False, True])
def test_gptq_against_its_definition(version: int, reorder: bool) -> None:
    rng = np.random.default_rng(6)
    out, width, size = 16, 64, 32
    codes = rng.integers(0, 16, (out, width), dtype=np.uint8)
    zeros = rng.integers(1, 16, (width // size, out), dtype=np.int32)
    scale = halves(rng, zeros.shape)
    group = np.arange(width) // size
    perm = None
    if reorder:
        group = rng.permutation(group)
        perm = np.argsort(group, kind="stable").astype(np.int32)
    stored = (zeros - (2 - version)).astype(np.uint8)
    tensor = pack.gptq(
        slow_pack(codes, 4).T, slow_pack(stored, 4), scale, QuantScheme(4, size, True),
        stored_minus_one=version == 1, perm=perm,
    )  # fmt: skip
    np.testing.assert_array_equal(tensor.dense32(), grouped_oracle(codes, zeros, scale, group))


@pytest.mark.parametrize("stored", [7, 8])
@pytest.mark.parametrize("says_version_1", [True, False])
def test_gptq_symmetric_zeros_are_told_by_their_value(stored: int, says_version_1: bool) -> None:
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 16, (8, 64), dtype=np.uint8)
    scale = halves(rng, (2, 8))
    zeros = np.full((2, 8), stored, np.uint8)
    tensor = pack.gptq(
        slow_pack(codes, 4).T, slow_pack(zeros, 4), scale, QuantScheme(4, 32, True), stored_minus_one=says_version_1
    )
    assert tensor.scheme.symmetric
    expected = grouped_oracle(codes, np.full((2, 8), 8), scale, np.arange(64) // 32)
    np.testing.assert_array_equal(tensor.dense32(), expected)


def test_awq_against_its_definition() -> None:
    rng = np.random.default_rng(8)
    out, width, size = 16, 64, 32
    codes = rng.integers(0, 16, (width, out), dtype=np.uint8)
    zeros = rng.integers(0, 16, (width // size, out), dtype=np.uint8)
    scale = halves(rng, zeros.shape)
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ packs element order[i] of eight into nibble i

    def awq_pack(values: NDArray[np.uint8]) -> NDArray[np.int32]:
        eights = values.reshape(values.shape[0], -1, 8)[..., order]
        return slow_pack(np.ascontiguousarray(eights.reshape(values.shape)), 4)

    tensor = pack.awq(awq_pack(codes), awq_pack(zeros), scale, QuantScheme(4, size, True))
    expected = grouped_oracle(codes.T, zeros.astype(np.int32), scale, np.arange(width) // size)
    np.testing.assert_array_equal(tensor.dense32(), expected)
