"""Every bit layout that weights have on disk, each in its only copy.

Two families: GGUF's blocks (`KINDS`, `grouped`, `blocks`) and int32 words (compressed-tensors, GPTQ, AWQ).
All functions are pure numpy and exact: unpacking gives codes and scales whose values equal the format's own
reference arithmetic in float32. Layouts after ggml-common.h / ggml-quants.c (llama.cpp), compressed-tensors'
pack_quantized, AutoGPTQ's and AutoAWQ's packing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import BlockTensor, GroupedTensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Parts = tuple[Bytes, Floats, Floats | None]
"""codes `[…, blocks, block elements]`, scale and minimum `[…, blocks, groups per block]`."""


@dataclass(frozen=True)
class Kind:
    """One of GGUF's block formats: `block_bytes` bytes hold `block_size` neighbours along `in`."""

    name: str
    block_bytes: int
    block_size: int
    scheme: QuantScheme

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` elements, which must be whole blocks."""
        return width // self.block_size * self.block_bytes


def _kind(name: str, block_bytes: int, block_size: int, bits: int, group: int, symmetric: bool) -> Kind:
    """K-quants multiply a float16 by a small integer: their scales need float32 to be exact."""
    scheme = QuantScheme(bits, group, symmetric, "float16" if block_size == 32 else "float32")
    return Kind(name, block_bytes, block_size, scheme)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _kind("Q4_0", 18, 32, 4, 32, True),
        _kind("Q4_1", 20, 32, 4, 32, False),
        _kind("Q5_0", 22, 32, 5, 32, True),
        _kind("Q5_1", 24, 32, 5, 32, False),
        _kind("Q8_0", 34, 32, 8, 32, True),
        _kind("Q2_K", 84, 256, 2, 16, False),
        _kind("Q3_K", 110, 256, 3, 16, True),
        _kind("Q4_K", 144, 256, 4, 32, False),
        _kind("Q5_K", 176, 256, 5, 32, False),
        _kind("Q6_K", 210, 256, 6, 16, True),
    )
}


# -- GGUF blocks -> codes ------------------------------------------------------------------------------------
def grouped(tensor: BlockTensor) -> GroupedTensor:
    """The same values, codes one to a byte. Takes about one byte per element of memory."""
    kind = KINDS[tensor.kind]
    width = tensor.shape[-1]
    count = width // kind.block_size
    data = np.ascontiguousarray(tensor.data).reshape(*tensor.shape[:-1], count, kind.block_bytes)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged scales may be inf or nan: they stay what they are
        codes, scale, minimum = _UNPACK[tensor.kind](data)
    groups = kind.scheme.groups(width)
    return GroupedTensor(
        kind.scheme,
        codes.reshape(tensor.shape),
        scale.reshape(*tensor.shape[:-1], groups),
        None if minimum is None else minimum.reshape(*tensor.shape[:-1], groups),
    )


def _halves(data: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of every block, `[…, blocks, 1]` as float32."""
    return np.ascontiguousarray(data[..., start : start + 2]).view(np.float16).astype(np.float32)


def _fields(data: Bytes, bits: int) -> Bytes:
    """`[…, n]` bytes to `[…, 8 / bits, n]`: field k holds bits k·bits … of every byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (data[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _flat(codes: Bytes, axes: int = 2) -> Bytes:
    """Merge the last `axes` axes."""
    return codes.reshape(*codes.shape[:-axes], -1)


def _q4_0(data: Bytes) -> Parts:
    return _flat(_fields(data[..., 2:], 4)), _halves(data, 0), None


def _q4_1(data: Bytes) -> Parts:
    return _flat(_fields(data[..., 4:], 4)), _halves(data, 0), _halves(data, 2)


def _fifth_bits(data: Bytes) -> Bytes:
    """Four bytes, bit i for element i, as 0 or 16: `[…, 32]`."""
    return np.unpackbits(data, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(data: Bytes) -> Parts:
    return _flat(_fields(data[..., 6:], 4)) | _fifth_bits(data[..., 2:6]), _halves(data, 0), None


def _q5_1(data: Bytes) -> Parts:
    codes = _flat(_fields(data[..., 8:], 4)) | _fifth_bits(data[..., 4:8])
    return codes, _halves(data, 0), _halves(data, 2)


def _q8_0(data: Bytes) -> Parts:
    return data[..., 2:] ^ np.uint8(128), _halves(data, 0), None  # int8 + 128, modulo 256


def _q2_k(data: Bytes) -> Parts:
    scales, codes = data[..., :16], data[..., 16:80]
    quads = _fields(codes.reshape(*codes.shape[:-1], 2, 32), 2)
    scale = _halves(data, 80) * (scales & np.uint8(15)).astype(np.float32)
    minimum = -(_halves(data, 82) * (scales >> np.uint8(4)).astype(np.float32))
    return _flat(quads, 3), scale, minimum


def _q3_k(data: Bytes) -> Parts:
    """Stored are two low bits and, in `hmask`, the third; value = scale · (code − 4)."""
    hmask, low = data[..., :32], data[..., 32:96]
    codes = _flat(_fields(low.reshape(*low.shape[:-1], 2, 32), 2), 3)
    codes |= _flat(_fields(hmask, 1)) << np.uint8(2)
    sixths = _flat(_fields(data[..., 96:104], 4)) | (_flat(_fields(data[..., 104:108], 2)) << np.uint8(4))
    scale = _halves(data, 108) * (sixths.astype(np.float32) - np.float32(32))
    return codes, scale, None


def _scales_k(data: Bytes) -> tuple[Floats, Floats]:
    """Q4_K's and Q5_K's twelve bytes: eight 6-bit scales and eight 6-bit minima."""
    d, m, md = data[..., 0:4], data[..., 4:8], data[..., 8:12]
    low, high, six = np.uint8(15), np.uint8(48), np.uint8(63)
    scale = np.concatenate([d & six, (md & low) | ((d >> np.uint8(2)) & high)], axis=-1)
    minimum = np.concatenate([m & six, (md >> np.uint8(4)) | ((m >> np.uint8(2)) & high)], axis=-1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _scaled_k(data: Bytes) -> tuple[Floats, Floats]:
    scale, minimum = _scales_k(data[..., 4:16])
    return _halves(data, 0) * scale, -(_halves(data, 2) * minimum)


def _q4_k(data: Bytes) -> Parts:
    low = data[..., 16:144]
    return _flat(_fields(low.reshape(*low.shape[:-1], 4, 32), 4), 3), *_scaled_k(data)


def _q5_k(data: Bytes) -> Parts:
    high, low = data[..., 16:48], data[..., 48:176]
    codes = _flat(_fields(low.reshape(*low.shape[:-1], 4, 32), 4), 3)
    codes |= _flat(_fields(high, 1)) << np.uint8(4)
    return codes, *_scaled_k(data)


def _q6_k(data: Bytes) -> Parts:
    low, high = data[..., :128], data[..., 128:192]
    codes = _flat(_fields(low.reshape(*low.shape[:-1], 2, 64), 4), 3)
    codes |= _flat(_fields(high.reshape(*high.shape[:-1], 2, 32), 2), 3) << np.uint8(4)
    scale = _halves(data, 208) * data[..., 192:208].view(np.int8).astype(np.float32)
    return codes, scale, None


_UNPACK: dict[str, Callable[[Bytes], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


# -- codes -> GGUF blocks ------------------------------------------------------------------------------------
def blocks(kind: str, tensor: GroupedTensor) -> BlockTensor:
    """The same codes and scales in GGUF's Q4_0, Q4_1 or Q8_0 blocks, exactly: `grouped` undoes it.

    Raises ValueError when the tensor's scheme or width is not the kind's.
    """
    spec = KINDS[kind]
    if kind not in ("Q4_0", "Q4_1", "Q8_0"):
        raise ValueError(f"{kind} is not a kind that we write")
    if tensor.scheme != spec.scheme or tensor.perm is not None or tensor.shape[-1] % spec.block_size:
        raise ValueError(f"a {tensor.scheme} tensor of shape {tensor.shape} is not {kind}")
    codes = tensor.codes.reshape(*tensor.shape[:-1], -1, spec.block_size)
    parts = [_half_bytes(tensor.scale)]
    if tensor.minimum is not None:
        parts.append(_half_bytes(tensor.minimum))
    if kind == "Q8_0":
        parts.append(codes ^ np.uint8(128))
    else:
        parts.append(codes[..., :16] | (codes[..., 16:] << np.uint8(4)))
    return BlockTensor(kind, _flat(np.concatenate(parts, axis=-1)), tensor.shape)


def _half_bytes(values: Floats) -> Bytes:
    return values.astype(np.float16)[..., None].view(np.uint8)


# -- int32 words ---------------------------------------------------------------------------------------------
WORD_BITS = (2, 4, 8)
"""Code widths that fill an int32 without a remainder: what GPTQ's layout is read in."""

DENSE_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Code widths of compressed-tensors, whose codes lie end to end over the words of a row."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's GEMM layout keeps element i of eight: in nibble AWQ_ORDER[i]."""


def unpack_words(words: NDArray[np.int32], bits: int, count: int) -> Bytes:
    """`[rows, words]` to `[rows, count]` codes; code i lies at bits `bits`·i … of its row, over words' borders too."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data[..., :count]
    if 8 % bits:
        stream = np.unpackbits(data, axis=-1, count=count * bits, bitorder="little")
        return np.packbits(stream.reshape(*data.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]
    return _flat(np.swapaxes(_fields(data, bits), -1, -2))[..., :count]


def pack_words(codes: Bytes, bits: int) -> NDArray[np.int32]:
    """The inverse of `unpack_words`; the last word of a row is filled up with zeros."""
    words = -(-codes.shape[-1] * bits // 32)
    if 8 % bits:
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        data = np.zeros((*codes.shape[:-1], words * 4), np.uint8)
        packed = np.packbits(_flat(stream), axis=-1, bitorder="little")
        data[..., : packed.shape[-1]] = packed
        return data.view(np.int32)
    per_byte = 8 // bits
    padded = np.zeros((*codes.shape[:-1], words * 4 * per_byte), np.uint8)
    padded[..., : codes.shape[-1]] = codes
    data = padded[..., ::per_byte].copy()
    for i in range(1, per_byte):
        data |= padded[..., i::per_byte] << np.uint8(i * bits)
    return data.view(np.int32)


def with_zero_points(
    scheme: QuantScheme, codes: Bytes, scale: Floats, zeros: NDArray[np.int32], perm: NDArray[np.int32] | None = None
) -> GroupedTensor:
    """(code − zero) · scale as a GroupedTensor; zeros `[out, groups]`. Symmetric when every zero is the middle.

    Otherwise minimum = −zero · scale, which needs more bits than a float16 has: its scale_type is float32. With
    scales of 16 bits code · scale + minimum is then exact.
    """
    symmetric = QuantScheme(scheme.bits, scheme.group_size, True, scheme.scale_type)
    if np.all(zeros == symmetric.zero):
        return GroupedTensor(symmetric, codes, scale, None, perm)
    asymmetric = QuantScheme(scheme.bits, scheme.group_size, False, "float32")
    return GroupedTensor(asymmetric, codes, scale, -(zeros.astype(np.float32) * scale), perm)


def compressed_int4(
    packed: NDArray[np.int32],
    scale: Floats,
    zeros: NDArray[np.int32] | None,
    scheme: QuantScheme,
    width: int,
    perm: NDArray[np.int32] | None = None,
) -> GroupedTensor:
    """compressed-tensors' pack-quantized: packed `[out, words]`, scale `[out, groups]`, zeros `[out·bits/32, groups]`.

    Codes and zero points are stored with 2^(bits−1) added. `perm` sorts the columns by their group (g_idx).
    """
    codes = unpack_words(packed, scheme.bits, width)
    if perm is not None:
        codes = codes[:, perm]
    if zeros is None:
        middle = np.full((1, 1), 1 << (scheme.bits - 1), np.int32)
        return with_zero_points(scheme, codes, scale, middle, perm)
    points = unpack_words(zeros.T, scheme.bits, codes.shape[0]).T
    return with_zero_points(scheme, codes, scale, points.astype(np.int32), perm)


def compressed_words(tensor: GroupedTensor) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    """`weight_packed` and, when the tensor is asymmetric, `weight_zero_point` of compressed-tensors.

    Raises ValueError when the minimum is not an integer multiple of the scale, as that format needs.
    """
    codes = tensor.codes
    if tensor.perm is not None:
        codes = np.empty_like(tensor.codes)
        codes[:, tensor.perm] = tensor.codes
    packed = pack_words(codes, tensor.scheme.bits)
    if tensor.minimum is None:
        return packed, None
    return packed, np.ascontiguousarray(pack_words(np.ascontiguousarray(zero_points(tensor).T), tensor.scheme.bits).T)


def zero_points(tensor: GroupedTensor) -> Bytes:
    """The codes that mean 0 in each group of an asymmetric tensor, `[out, groups]`.

    Raises ValueError where no code does.
    """
    assert tensor.minimum is not None, "a symmetric tensor has no zero points"
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.where(tensor.scale == 0, 0, np.rint(-tensor.minimum / tensor.scale))
    exact = np.array_equal(-(zeros.astype(np.float32) * tensor.scale), tensor.minimum)
    if not exact or zeros.min(initial=0) < 0 or zeros.max(initial=0) >= 1 << tensor.scheme.bits:
        raise ValueError("the minima are not whole multiples of the scales")
    return zeros.astype(np.uint8)


def gptq(
    qweight: NDArray[np.int32],
    qzeros: NDArray[np.int32],
    scale: Floats,
    scheme: QuantScheme,
    *,
    stored_minus_one: bool,
    perm: NDArray[np.int32] | None = None,
) -> GroupedTensor:
    """GPTQ: qweight `[in·bits/32, out]`, qzeros `[groups, out·bits/32]`, scale `[groups, out]`.

    Version 1 stores zero − 1 (modulo 2^bits), version 2 the zero itself. Configurations mislabel the two, so that
    a file whose zeros are all the middle, or all one less, is taken for symmetric whatever it says.
    """
    out = qweight.shape[1]
    width = qweight.shape[0] * 32 // scheme.bits
    codes = unpack_words(qweight.T, scheme.bits, width)
    if perm is not None:
        codes = codes[:, perm]
    zeros = unpack_words(qzeros, scheme.bits, out).T.astype(np.int32)
    middle = 1 << (scheme.bits - 1)
    if np.all(zeros == middle) or np.all(zeros == middle - 1):
        zeros = np.full_like(zeros, middle)
    elif stored_minus_one:
        zeros = (zeros + 1) & ((1 << scheme.bits) - 1)
    return with_zero_points(scheme, np.ascontiguousarray(codes), np.ascontiguousarray(scale.T), zeros, perm)


def awq(qweight: NDArray[np.int32], qzeros: NDArray[np.int32], scale: Floats, scheme: QuantScheme) -> GroupedTensor:
    """AWQ's GEMM layout: qweight `[in, out/8]`, qzeros `[groups, out/8]`, scale `[groups, out]`."""
    codes = np.ascontiguousarray(_awq_codes(qweight).T)
    zeros = np.ascontiguousarray(_awq_codes(qzeros).T).astype(np.int32)
    return with_zero_points(scheme, codes, np.ascontiguousarray(scale.T), zeros)


def _awq_codes(words: NDArray[np.int32]) -> Bytes:
    nibbles = unpack_words(words, 4, words.shape[-1] * 8)
    return _flat(nibbles.reshape(*words.shape, 8)[..., AWQ_ORDER])


# -- e4m3 ------------------------------------------------------------------------------------------------------
def _e4m3_values() -> Floats:
    """What each byte means as e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are nan."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).astype(np.float64)
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(byte & 127) == 127] = np.nan
    return np.where(byte > 127, -size, size).astype(np.float32)


_E4M3 = _e4m3_values()


def e4m3(data: Bytes) -> Floats:
    """The numbers that these bytes are."""
    values: Floats = _E4M3[data]
    return values
