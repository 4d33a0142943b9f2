"""Rounding to nearest: float32 matrices to codes, as pure functions.

The ranges are compressed-tensors' own (`calculate_qparams`): a symmetric scale is absmax / ((2^bits − 1) / 2), so
absmax / 7.5 at four bits, and an asymmetric range always holds 0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miaotui.quant.scheme import QuantScheme, ScaleType
from miaotui.quant.tensor import GroupedTensor

Floats = NDArray[np.float32]
Minimum = Literal["zero_point", "free"]
"""What an asymmetric minimum may be: −z·scale with a whole z (compressed-tensors), or any number (GGUF's Q4_1)."""


def bfloat16_bits(values: Floats) -> NDArray[np.uint16]:
    """float32 to bfloat16's bits, to nearest, ties to even; a nan stays a (quiet) nan."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(64)
    return np.where((bits & np.uint32(0x7FFFFFFF)) > 0x7F800000, quiet, rounded).astype(np.uint16)


def to_scale_type(values: Floats, kind: ScaleType) -> Floats:
    """The nearest numbers that `kind` can hold, as float32; beyond its range, its largest."""
    if kind == "float32":
        return values
    if kind == "bfloat16":
        return (bfloat16_bits(values).astype(np.uint32) << np.uint32(16)).view(np.float32)
    largest = np.float32(np.finfo(np.float16).max)
    return np.clip(values, -largest, largest).astype(np.float16).astype(np.float32)


def by_group(weight: Floats, scheme: QuantScheme) -> Floats:
    """`[out, in]` to `[out, groups, group size]`; a short last group repeats its last element, which moves no range."""
    size = scheme.group_size or weight.shape[1]
    short = -weight.shape[1] % size
    if short:
        weight = np.pad(weight, ((0, 0), (0, short)), mode="edge")
    return weight.reshape(weight.shape[0], -1, size)


def round_to_nearest(weight: Floats, scheme: QuantScheme, minimum: Minimum = "zero_point") -> GroupedTensor:
    """Each group's min-max (or absmax) range in `scheme`, scales rounded to its scale type before the codes are.

    `minimum` matters to an asymmetric scheme. With "zero_point" minima are whole multiples of the rounded scales,
    which needs the result's scale_type to be float32 although the scales themselves are of the scheme's.
    """
    groups = by_group(np.ascontiguousarray(weight, np.float32), scheme)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    top = np.float32((1 << scheme.bits) - 1)
    if scheme.symmetric:
        scale = _usable(to_scale_type(np.maximum(-low, high) / (top / 2), scheme.scale_type))
        return GroupedTensor(scheme, encode(weight, scheme, scale), scale)
    if minimum == "free":
        floor = to_scale_type(low, scheme.scale_type)
        scale = _usable(to_scale_type((high - floor) / top, scheme.scale_type))
        return GroupedTensor(scheme, encode(weight, scheme, scale, floor), scale, floor)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _usable(to_scale_type((high - low) / top, scheme.scale_type))
    floor = -(np.clip(np.rint(-low / scale), 0, top) * scale)
    exact = QuantScheme(scheme.bits, scheme.group_size, False, "float32")
    return GroupedTensor(exact, encode(weight, exact, scale, floor), scale, floor)


def _usable(scale: Floats) -> Floats:
    """A group of zeros, or of numbers too small for the scale type, gets the scale 1: its codes then mean 0."""
    return np.where(scale > 0, scale, np.float32(1))


def encode(weight: Floats, scheme: QuantScheme, scale: Floats, minimum: Floats | None = None) -> NDArray[np.uint8]:
    """The nearest codes `[out, in]` for given scales and minima `[out, groups]`; ties go to the even one."""
    groups = by_group(np.ascontiguousarray(weight, np.float32), scheme)
    if minimum is None:
        codes = np.rint(groups / scale[..., None]) + np.float32(scheme.zero)
    else:
        codes = np.rint((groups - minimum[..., None]) / scale[..., None])
    whole: NDArray[np.uint8] = np.clip(codes, 0, (1 << scheme.bits) - 1).astype(np.uint8)
    return whole.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
