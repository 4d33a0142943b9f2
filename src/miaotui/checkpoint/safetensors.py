"""Safetensors folders: one file or shards under an index, config.json beside them, quantised layouts joined.

The header is parsed by the rules of the reference implementation (bounded, no holes, no overlaps), and nothing is
read but what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import files, layouts
from miaotui.checkpoint.files import MAX_HEADER, MappedFile, beside, damaged
from miaotui.checkpoint.layout import Mismatch
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.quant.tensor import DenseTensor, DenseType, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_RANK = 16

DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (64, "<f8"), "F32": (32, "<f4"), "F16": (16, "<f2"), "BF16": (16, "<u2"),
    "I64": (64, "<i8"), "I32": (32, "<i4"), "I16": (16, "<i2"), "I8": (8, "<i1"),
    "U64": (64, "<u8"), "U32": (32, "<u4"), "U16": (16, "<u2"), "U8": (8, "<u1"), "BOOL": (8, "<u1"),
    "F8_E4M3": (8, "<u1"), "F8_E5M2": (8, None), "F8_E8M0": (8, None), "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None), "F6_E2M3": (6, None), "F6_E3M2": (6, None), "F4": (4, None), "C64": (64, None),
}  # fmt: skip
"""The format's types: bits of one element, and the numpy type that holds it where we read it."""

DENSE: dict[str, DenseType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies; `start` counts from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One mapped file and its parsed header."""

    file: MappedFile
    entries: dict[str, Entry]
    header_bytes: int


def read_shard(path: Path) -> Shard:
    """Parse a file's header. Raises CheckpointError unless its tensors tile the rest of the file exactly."""
    file = MappedFile(path)
    if file.size < 8:
        damaged(path, "it is shorter than a safetensors header")
    length = int.from_bytes(file.map[:8], "little")
    if length > MAX_HEADER or length > file.size - 8:
        damaged(path, f"it claims a header of {length} bytes, and has {file.size} in all", _NOT_SAFETENSORS)
    header = files.parse_json(path, file.map[8 : 8 + length])
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    reached = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != reached:
            damaged(path, f"the tensor {name[:100]!r} overlaps another or leaves a hole before it")
        reached += entry.nbytes
    if reached != file.size:
        damaged(path, f"its tensors end at byte {reached}, the file at {file.size}")
    return Shard(file, entries, 8 + length)


_NOT_SAFETENSORS = "Download it again; if it came from `git clone`, fetch the real file with `git lfs pull`."


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    """One checked header entry."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        damaged(path, f"the header entry of {name[:100]!r} is not a dtype, a shape and offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        damaged(path, f"the tensor {name[:100]!r} has the unknown type {str(dtype)[:40]!r}")
    if not _sizes(shape) or len(shape) > MAX_RANK or not _sizes(offsets) or len(offsets) != 2:
        damaged(path, f"the tensor {name[:100]!r} has an impossible shape or offsets")
    elements = 1
    for extent in shape:
        elements *= extent
    bits = elements * DTYPES[dtype][0]
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        damaged(path, f"the tensor {name[:100]!r} has {end - begin} bytes where its shape needs {bits / 8:g}")
    return Entry(dtype, tuple(shape), base + begin, end - begin)


def _sizes(value: Any) -> bool:
    """A list of integers from 0 to 2⁴⁸."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= 1 << 48 for item in value)


class SafetensorsCheckpoint:
    """An opened folder; see `Checkpoint`. `weights` names the one file to read when it is not found by rule."""

    format = "safetensors"

    def __init__(self, folder: Path, weights: str | None = None) -> None:
        self.path = folder
        self.config: Mapping[str, Any] = self._read_config()
        self._shards: dict[str, Shard] = {}
        self._where: dict[str, Shard] = {}
        index = None if weights else _index(folder)
        if index is None:
            self._add_all(weights or _only_file(folder))
        else:
            self._add_index(index)
        entries = {name: shard.entries[name] for name, shard in self._where.items()}
        self._layout = layouts.detect(self.config, folder)
        self._joined: dict[str, dict[str, str]] = self._layout.find(entries) if self._layout else {}
        pieces = {piece for parts in self._joined.values() for piece in parts.values()}
        self._plain = [name for name in self._where if name not in pieces]
        for name in self._plain:
            if name in self._joined:
                damaged(folder, f"it has {name[:100]!r} both whole and in parts")

    def _read_config(self) -> dict[str, Any]:
        path = beside(self.path, "config.json")
        if path is None:
            raise CheckpointError(f"{self.path} has no config.json.", "Put the model's config.json beside its weights.")
        return files.read_json(path)

    def _open(self, name: str) -> Shard:
        if name not in self._shards:
            path = beside(self.path, name)
            if path is None:
                raise CheckpointError(f"{self.path} lacks the file {name[:100]!r}.", "Download all of its files.")
            self._shards[name] = read_shard(path)
        return self._shards[name]

    def _add_all(self, name: str) -> None:
        shard = self._open(name)
        self._where = dict.fromkeys(shard.entries, shard)

    def _add_index(self, index: Path) -> None:
        """Open the shards that the index names, and check that each has the tensors it is said to have."""
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            damaged(index, "it has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors"):
                damaged(index, f"it says that {name[:100]!r} is in {str(file)[:100]!r}")
            shard = self._open(file)
            if name not in shard.entries:
                damaged(shard.file.path, f"the index says that {name[:100]!r} is in it, and it is not")
            self._where[name] = shard

    def names(self) -> list[str]:
        return [*self._plain, *self._joined]

    def tensor(self, name: str) -> Tensor:
        parts = self._joined.get(name)
        if parts is not None:
            assert self._layout is not None
            arrays = {piece: self._piece(raw) for piece, raw in parts.items()}
            try:
                return self._layout.join(name, arrays)
            except Mismatch as error:
                raise CheckpointError(f"{self.path} has a damaged {name!r}: {error}.", files.AGAIN) from error
        if name not in self._where:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.", files.AGAIN)
        dtype, array = self._piece(name)
        if dtype not in DENSE:
            raise UnsupportedModelError(
                f"{self.path} stores {name!r} as {dtype}, which is not supported.",
                f"Use a model stored as {', '.join(DENSE)}, or in a supported quantised layout.",
            )
        return DenseTensor(DENSE[dtype], array)

    def _piece(self, raw: str) -> tuple[str, NDArray[Any]]:
        """A stored tensor as its file has it: the format's name of its type and a view."""
        shard = self._where[raw]
        entry = shard.entries[raw]
        numpy_type = DTYPES[entry.dtype][1]
        if numpy_type is None:
            raise UnsupportedModelError(
                f"{self.path} stores {raw!r} as {entry.dtype}, which is not supported.",
                f"Use a model stored as {', '.join(DENSE)}, or in a supported quantised layout.",
            )
        return entry.dtype, shard.file.array(entry.start, entry.shape, np.dtype(numpy_type))

    def asset(self, filename: str) -> Path | None:
        return beside(self.path, filename)

    @property
    def nbytes(self) -> int:
        return sum(shard.file.size for shard in self._shards.values())

    def fingerprint(self) -> str:
        return files.fingerprint((shard.file, shard.header_bytes) for _, shard in sorted(self._shards.items()))


def _index(folder: Path) -> Path | None:
    """The shard index, unless the folder has the whole model in one file."""
    return None if beside(folder, SINGLE) else beside(folder, INDEX)


def _only_file(folder: Path) -> str:
    """The name of the folder's one safetensors file."""
    if beside(folder, SINGLE):
        return SINGLE
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} has {len(found)} .safetensors files and no {INDEX}.",
            f"Keep one, name it {SINGLE}, or add the index.",
        )
    return found[0]
