"""Random weights in any storage kind, made as they are stored: no float32 detour, and a gigabyte takes a second.

A few million random numbers are drawn once for each kind and width. A tensor repeats that pattern from a place that
its name chooses; the pattern's length is a prime, so that neither rows nor tensors line up with each other. Speed
does not depend on the values as long as they are ordinary ones: each element has mean 0 and variance 1 / width, so
that activations keep their size through any number of layers.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.errors import UsageError
from miaotui.quant import pack
from miaotui.quant.rounding import bfloat16_bits, to_scale_type
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import BlockTensor, DenseTensor, DenseType, GroupedTensor, Tensor

ELEMENTS, GROUPS = 2_097_143, 65_521
"""How many codes or numbers are drawn, and how many groups with their scales; primes."""

DENSE: dict[str, DenseType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BLOCK_KINDS = ("Q4_0", "Q4_1", "Q8_0")
"""GGUF kinds that are made in their own blocks. The others are made as the codes and scales they are unpacked to."""

_SCHEME = re.compile(r"w([48])(?:g(\d{1,4})|-channel)(?:-(sym|asym))?")


@dataclass(frozen=True)
class Storage:
    """How matrices are stored: as numbers of type `dense`, or as codes of `scheme`, in a GGUF `kind` or without one."""

    name: str
    dense: DenseType | None = None
    scheme: QuantScheme | None = None
    kind: pack.Kind | None = None

    @classmethod
    def parse(cls, name: str) -> Storage:
        """`bf16 fp16 fp32`, a GGUF kind such as `q4_0` or `q4_k`, or a scheme such as `w4g64-sym` or `w8-channel`.

        Raises UsageError for anything else.
        """
        text = name.lower()
        if text in DENSE:
            return cls(text, dense=DENSE[text])
        kind = pack.KINDS.get(text.upper())
        if kind is not None:
            return cls(text, scheme=kind.scheme, kind=kind)
        match = _SCHEME.fullmatch(text)
        group = None if match is None or match[2] is None else int(match[2])
        if match is None or (group is not None and (group == 0 or group % 16)):
            raise UsageError(f"{name!r:.60} is no kind of weights that can be made up.", f"Choose one of {CHOICES}.")
        scheme = QuantScheme(int(match[1]), group, match[3] != "asym")
        return cls(str(scheme), scheme=scheme)

    @property
    def tables(self) -> Storage:
        """How embedding and head are stored beside such matrices: Q8_0 in GGUF files, bf16 in folders."""
        if self.dense is not None:
            return self
        return Storage.parse("bf16" if self.kind is None else "q8_0")

    def numbers(self, width: int) -> DenseType | None:
        """The type of a dense matrix of that width, None for codes. Rows that are not whole blocks are kept dense."""
        return "bfloat16" if self.kind is not None and width % self.kind.block_size else self.dense

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes that a matrix takes when it runs; codes run in 4 or 8 bits each."""
        dense = self.numbers(width)
        if dense is not None:
            return rows * width * (4 if dense == "float32" else 2)
        assert self.scheme is not None
        bits = 4 if self.scheme.bits <= 4 else 8
        number = 4 if self.scheme.scale_type == "float32" else 2
        return rows * (width * bits // 8 + self.scheme.groups(width) * number * (1 if self.scheme.symmetric else 2))

    def matrix(self, name: str, rows: int, width: int) -> Tensor:
        """A random matrix `[rows, width]`; the same name gives the same one."""
        seed = zlib.crc32(name.encode())
        dense = self.numbers(width)
        if dense is not None:
            return DenseTensor(dense, _repeat(_numbers(dense, width), rows * width, seed).reshape(rows, width))
        assert self.scheme is not None
        if self.kind is not None and self.kind.name in BLOCK_KINDS:
            blocks = _repeat(_blocks(self.kind, width), rows * (width // self.kind.block_size), seed)
            return BlockTensor(self.kind.name, blocks.reshape(rows, -1), (rows, width))
        groups = self.scheme.groups(width)
        scale, minimum = _scales(self.scheme, width)
        return GroupedTensor(
            self.scheme,
            _repeat(_codes(self.scheme), rows * width, seed).reshape(rows, width),
            _repeat(scale, rows * groups, seed).reshape(rows, groups),
            None if minimum is None else _repeat(minimum, rows * groups, seed).reshape(rows, groups),
        )


CHOICES = "bf16, fp16, fp32, " + ", ".join(map(str.lower, pack.KINDS)) + ", w4g32-sym, w4g32-asym, w8-channel, …"


def _repeat(pattern: NDArray[Any], count: int, seed: int) -> NDArray[Any]:
    """`count` items of the pattern, over and over from a place that `seed` chooses."""
    out = np.empty((count, *pattern.shape[1:]), pattern.dtype)
    source, done = seed % len(pattern), 0
    while done < count:
        taken = min(len(pattern) - source, count - done)
        out[done : done + taken] = pattern[source : source + taken]
        source, done = 0, done + taken
    return out


def _random() -> np.random.Generator:
    return np.random.default_rng(20240229)


@lru_cache(maxsize=8)
def _numbers(kind: DenseType, width: int) -> NDArray[Any]:
    values = _random().standard_normal(ELEMENTS, np.float32) / np.float32(np.sqrt(width))
    if kind == "bfloat16":
        return bfloat16_bits(values)
    return values.astype(np.float16) if kind == "float16" else values


@lru_cache(maxsize=8)
def _codes(scheme: QuantScheme) -> NDArray[np.uint8]:
    """Evenly spread; of a symmetric scheme without its lowest code, so that their mean is 0."""
    return _random().integers(scheme.symmetric, 1 << scheme.bits, ELEMENTS, np.uint8)


@lru_cache(maxsize=16)
def _scales(scheme: QuantScheme, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Scales between half and one and a half times what evenly spread codes need, and minima that centre them."""
    spread = np.sqrt(((2.0**scheme.bits - scheme.symmetric) ** 2 - 1) / 12)
    values = _random().uniform(0.5, 1.5, GROUPS) / (spread * np.sqrt(width))
    scale = to_scale_type(values.astype(np.float32), scheme.scale_type)
    if scheme.symmetric:
        return scale, None
    middle = np.float32(((1 << scheme.bits) - 1) / 2)
    return scale, to_scale_type(-middle * scale, scheme.scale_type)


@lru_cache(maxsize=8)
def _blocks(kind: pack.Kind, width: int) -> NDArray[np.uint8]:
    """`[GROUPS, bytes of a block]`."""
    scale, minimum = _scales(kind.scheme, width)
    codes = _repeat(_codes(kind.scheme), GROUPS * kind.block_size, 0).reshape(GROUPS, kind.block_size)
    column = None if minimum is None else minimum[:, None]
    return pack.blocks(kind.name, GroupedTensor(kind.scheme, codes, scale[:, None], column)).data
