"""GGUF, versions 2 and 3, one file or split: metadata key-values and tensors in blocks.

After the specification in ggml's docs/gguf.md. The header is parsed strictly and within bounds: nothing is
allocated for a count before the bytes that it needs are known to be there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import files
from miaotui.checkpoint.files import MAX_HEADER, MappedFile, damaged
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.quant.pack import KINDS
from miaotui.quant.tensor import BlockTensor, DenseTensor, Tensor

MAGIC = b"GGUF"
MAX_DEPTH = 4
"""How deep arrays of arrays may go."""
MAX_NAME = 64 * 1024
"""Bytes of a key or a tensor's name."""
MAX_KEYS, MAX_TENSORS = 100_000, 200_000
MAX_ITEMS = 4_000_000
"""Strings and inner arrays that a header may have in all; the largest vocabularies need a tenth."""
MAX_DIMENSIONS = 4
MAX_SPLITS = 9999

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""GGUF's value types as numpy's."""

DENSE_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
TYPE_NAMES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""ggml's tensor types, by number."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALAR_STRUCTS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"), 4: _U32,
    5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<B"), 10: _U64, 11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` is `[out, in]` (the file's own order reversed), `start` counts from the file's."""

    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Header:
    """A cursor over the mapped header. Every read checks that its bytes are there."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.data = file.map
        self.end = min(file.size, MAX_HEADER)
        self.position = 0
        self.items = 0

    def count_items(self, count: int, least_bytes: int) -> None:
        """Admit `count` values that become Python objects, each at least so many bytes in the file."""
        self.items += count
        if count > (self.end - self.position) // least_bytes or self.items > MAX_ITEMS:
            damaged(self.path, f"an array in it claims {count} values, more than can be there")

    def need(self, count: int) -> int:
        """Move past `count` bytes; returns where they start."""
        start = self.position
        if count > self.end - start:
            damaged(self.path, f"its header ends early, or is larger than {MAX_HEADER} bytes")
        self.position = start + count
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.data, self.need(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.data, self.need(8))[0])

    def name(self) -> str:
        """A key or tensor name: short, and UTF-8."""
        length = self.u64()
        if length > MAX_NAME:
            damaged(self.path, f"a name in it is {length} bytes long")
        start = self.need(length)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            damaged(self.path, "a name in it is not UTF-8")

    def string(self) -> str:
        start = self.need(self.u64())
        return self.data[start : self.position].decode(errors="replace")

    def strings(self, count: int) -> list[str]:
        """An array of strings. Vocabularies have 10⁵ of them, hence the plain loop and one decoding for all."""
        self.count_items(count, 8)
        data, position, end, unpack = self.data, self.position, self.end, _U64.unpack_from
        pieces: list[bytes] = []
        add = pieces.append
        for _ in range(count):
            if position + 8 > end:
                damaged(self.path, "its header ends early")
            start = position + 8
            position = start + unpack(data, position)[0]
            if position > end:
                damaged(self.path, "its header ends early")
            add(data[start:position])
        self.position = position
        return _decode_all(pieces)

    def value(self, kind: int, depth: int = 0) -> Any:
        """One value of the given type; arrays of numbers as numpy arrays, of strings as lists."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(depth)
        scalar = _SCALAR_STRUCTS.get(kind)
        if scalar is None:
            damaged(self.path, f"it has a value of the unknown type {kind}")
        number = scalar.unpack_from(self.data, self.need(scalar.size))[0]
        return self.boolean(number) if kind == BOOL else number

    def boolean(self, number: int) -> bool:
        if number > 1:
            damaged(self.path, f"a truth value in it is {number}")
        return bool(number)

    def array(self, depth: int) -> Any:
        kind, count = self.u32(), self.u64()
        if kind == STRING:
            return self.strings(count)
        if kind == ARRAY:
            if depth >= MAX_DEPTH:
                damaged(self.path, "it has arrays nested too deeply")
            self.count_items(count, 12)
            return [self.array(depth + 1) for _ in range(count)]
        if kind not in SCALARS:
            damaged(self.path, f"it has an array of the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        start = self.need(count * dtype.itemsize)
        numbers = np.frombuffer(self.data, "<u1" if kind == BOOL else dtype, count, start).copy() if count else None
        if numbers is None:
            return np.empty(0, dtype)
        if kind == BOOL:
            self.boolean(int(numbers.max()))
            return numbers.astype(np.bool_)
        return numbers


def _decode_all(pieces: list[bytes]) -> list[str]:
    """UTF-8 to str, all at once when no string holds a NUL; undecodable bytes become U+FFFD."""
    joined = b"\0".join(pieces)
    if pieces and joined.count(0) == len(pieces) - 1:
        try:
            return joined.decode().split("\0")
        except UnicodeDecodeError:
            pass
    return [piece.decode(errors="replace") for piece in pieces]


@dataclass(frozen=True)
class _File:
    """One parsed file."""

    file: MappedFile
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    header_bytes: int


def _read(path: Path) -> _File:
    file = MappedFile(path)
    header = _Header(file)
    _check_start(header)
    tensor_count, key_count = header.u64(), header.u64()
    rest = header.end - header.position
    if tensor_count > min(MAX_TENSORS, rest // 24) or key_count > min(MAX_KEYS, rest // 13):
        damaged(path, f"it claims {tensor_count} tensors and {key_count} keys, more than fit in it")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = header.name()
        if key in metadata:
            damaged(path, f"the key {key[:100]!r} appears twice")
        metadata[key] = header.value(header.u32())
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        damaged(path, f"its alignment {alignment!r:.40} is not a power of two from 8")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name = header.name()
        if name in tensors:
            damaged(path, f"the tensor {name[:100]!r} appears twice")
        tensors[name] = _tensor_info(header, name, alignment)
    base = -(-header.position // alignment) * alignment
    tensors = {name: _placed(info, base) for name, info in tensors.items()}
    _check_places(path, tensors, file.size)
    return _File(file, metadata, tensors, header.position)


def _check_start(header: _Header) -> None:
    start = header.need(4)
    magic = header.data[start : start + 4]
    if magic != MAGIC:
        damaged(header.path, f"it starts with {magic!r}, not with {MAGIC!r}", "Pass a GGUF file.")
    version = header.u32()
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        cause = "it is big-endian" if swapped else f"its GGUF version is {version}"
        damaged(header.path, cause, "Convert the model again with a current llama.cpp, little-endian.")


def _tensor_info(header: _Header, name: str, alignment: int) -> TensorInfo:
    """One entry of the tensor table; `start` still counts from the data's beginning."""
    dimensions = header.u32()
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        damaged(header.path, f"the tensor {name[:100]!r} has {dimensions} dimensions")
    shape = tuple(header.u64() for _ in range(dimensions))[::-1]
    number, start = header.u32(), header.u64()
    kind = TYPE_NAMES.get(number)
    if kind not in KINDS and kind not in DENSE_TYPES:
        supported = ", ".join([*DENSE_TYPES, *KINDS])
        raise UnsupportedModelError(
            f"{header.path} stores {name[:100]!r} as {kind or f'type {number}'}, which is not supported.",
            f"Use a file whose tensors are of these types: {supported}.",
        )
    size, per_block = (np.dtype(DENSE_TYPES[kind]).itemsize, 1) if kind in DENSE_TYPES else _block(kind)
    elements = 1
    for extent in shape:
        elements *= extent
    if not elements or elements > 1 << 48:
        damaged(header.path, f"the tensor {name[:100]!r} has the impossible shape {shape}")
    if shape[-1] % per_block or start % alignment:
        damaged(header.path, f"the tensor {name[:100]!r} is not made of whole blocks, or is not aligned")
    assert kind is not None
    return TensorInfo(kind, shape, start, elements // per_block * size)


def _block(kind: str | None) -> tuple[int, int]:
    assert kind is not None
    return KINDS[kind].block_bytes, KINDS[kind].block_size


def _placed(info: TensorInfo, base: int) -> TensorInfo:
    return TensorInfo(info.type, info.shape, base + info.start, info.nbytes)


def _check_places(path: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """Every tensor in the file, none over another."""
    reached, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < reached:
            damaged(path, f"the tensors {before[:100]!r} and {name[:100]!r} overlap")
        reached, before = info.start + info.nbytes, name
    if reached > size:
        damaged(path, f"the tensor {before[:100]!r} ends at byte {reached}, the file at {size}")


_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")


def split_paths(path: Path) -> list[Path]:
    """All files of the split that `path` belongs to by its name (`…-00001-of-00003.gguf`), or just it."""
    match = _SPLIT.search(path.name)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_SPLITS:
        return [path]
    stem = path.name[: match.start()]
    return [path.with_name(f"{stem}-{i:05d}-of-{match[2]}.gguf") for i in range(1, int(match[2]) + 1)]


class GGUFCheckpoint:
    """An opened GGUF model; see `Checkpoint`. Rows of Q and K are in the file's order (llama.cpp permutes them)."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        first = _read(path)
        count = first.metadata.get("split.count", 1)
        paths = split_paths(path) if type(count) is int and count > 1 else [path]
        if type(count) is not int or count < 0 or (count > 1 and len(paths) != count):
            damaged(path, f"it is part of a model in {count!r:.20} files but is not named like one")
        for other in paths:
            if not other.is_file():
                raise CheckpointError(f"{other} is missing; the model has {len(paths)} files.", "Download all of them.")
        self.path = path
        self._files = [first if other == path else _read(other) for other in paths]
        self.config: Mapping[str, Any] = self._files[0].metadata
        self._where: dict[str, _File] = {}
        for part in self._files:
            for name in part.tensors:
                if name in self._where:
                    damaged(part.file.path, f"the tensor {name[:100]!r} is in another file of the model too")
                self._where[name] = part

    def names(self) -> list[str]:
        return list(self._where)

    def tensor(self, name: str) -> Tensor:
        part = self._where.get(name)
        if part is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.", files.AGAIN)
        info = part.tensors[name]
        if info.type == "F32":
            return DenseTensor("float32", part.file.array(info.start, info.shape, "<f4"))
        if info.type == "F16":
            return DenseTensor("float16", part.file.array(info.start, info.shape, "<f2"))
        if info.type == "BF16":
            return DenseTensor("bfloat16", part.file.array(info.start, info.shape, "<u2"))
        rows = (*info.shape[:-1], KINDS[info.type].row_bytes(info.shape[-1]))
        data: NDArray[np.uint8] = part.file.array(info.start, rows, "<u1")
        return BlockTensor(info.type, data, info.shape)

    def asset(self, filename: str) -> Path | None:
        return files.beside(self.path.parent, filename)

    @property
    def nbytes(self) -> int:
        return sum(part.file.size for part in self._files)

    def fingerprint(self) -> str:
        return files.fingerprint((part.file, part.header_bytes) for part in self._files)
