"""Writing: files and folders that appear whole or not at all, and streamed safetensors and GGUF.

Every writer asks for one tensor at a time (`load(name)`), so memory is bounded by the largest one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.gguf import BOOL, DENSE_TYPES, SCALARS, STRING, TYPE_NAMES
from miaotui.checkpoint.safetensors import DTYPES, INDEX, SINGLE
from miaotui.errors import UsageError
from miaotui.quant.pack import KINDS
from miaotui.quant.tensor import BlockTensor, DenseTensor

ALIGNMENT = 32
DEFAULT_SHARD = 5_000_000_000
"""Bytes of one shard, as transformers has it."""


# -- whole or not at all -------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write that takes `path`'s place when the block ends well, and vanishes when it does not.

    `mode` is who may read it, as in chmod; None: who may read any new file.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode if mode is not None else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises UsageError when `path` is there and not an empty folder, unless `replace`.
    """
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} is there already.", "Choose another output folder, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield building
        os.chmod(building, 0o777 & ~_umask())
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, aside / path.name)
            os.replace(building, path)
            shutil.rmtree(aside)
        else:
            os.replace(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file as the hub's are: indented, UTF-8."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


# -- safetensors ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file to be: its type by the format's name (`F16`, `BF16`, `I32`, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8


Load = Callable[[str], NDArray[Any]]
"""The array of a stored tensor by name; bfloat16 as its uint16 bits."""


def write_safetensors(
    path: Path, tensors: Sequence[Stored], load: Load, metadata: Mapping[str, str] | None = None
) -> None:
    """One file, header first, then each tensor as `load` gives it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    ordered = sorted(tensors, key=lambda tensor: (-DTYPES[tensor.dtype][0], tensor.name))  # keeps everything aligned
    for tensor in ordered:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            _write_array(file, tensor, load(tensor.name))


def _write_array(file: IO[bytes], tensor: Stored, array: NDArray[Any]) -> None:
    numpy_type = DTYPES[tensor.dtype][1]
    assert numpy_type is not None, f"{tensor.dtype} is not a type that we write"
    expected = np.dtype(numpy_type)
    if array.shape != tensor.shape or array.dtype.itemsize != expected.itemsize:
        announced = f"{tensor.name} was announced as {tensor.dtype} {tensor.shape}"
        raise ValueError(f"{announced} and came as {array.dtype} {array.shape}")
    if array.size:
        file.write(np.ascontiguousarray(array).view(expected).data)


def write_sharded(
    folder: Path,
    tensors: Sequence[Stored],
    load: Load,
    *,
    shard_bytes: int = DEFAULT_SHARD,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """`model.safetensors`, or shards of at most `shard_bytes` (a larger tensor gets its own) and their index."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        size += tensor.nbytes
        if shards[-1] and size > shard_bytes:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, tensors, load, metadata)
        return [folder / SINGLE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, load, metadata)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [folder / name for name in names]


# -- GGUF ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Blocked:
    """One tensor of a GGUF file to be: `kind` is F32, F16, BF16 or a block kind; `shape` is `[out, in]`."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        rows = int(np.prod(self.shape[:-1], dtype=object))
        if self.kind in DENSE_TYPES:
            return rows * self.shape[-1] * np.dtype(DENSE_TYPES[self.kind]).itemsize
        assert self.shape[-1] % KINDS[self.kind].block_size == 0, f"{self.name} is not made of whole {self.kind} blocks"
        return rows * KINDS[self.kind].row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Blocked],
    load: Callable[[str], DenseTensor | BlockTensor],
) -> None:
    """One GGUF version 3 file.

    A metadata value is a bool, a str, an int (uint32, or the first of int32, uint64, int64 that holds it), a float
    (float32), a numpy scalar or array (its own type), or a list of any one of them.
    """
    numbers = {name: number for number, name in TYPE_NAMES.items()}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, data = _encode(value)
        head += [_string(key), struct.pack("<I", kind), data]
    offset = 0
    for tensor in tensors:
        head += [_string(tensor.name), struct.pack("<I", len(tensor.shape))]
        head += [struct.pack("<Q", extent) for extent in reversed(tensor.shape)]
        head.append(struct.pack("<IQ", numbers[tensor.kind], offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    with atomic_file(path) as file:
        file.write(b"".join(head))
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            array = load(tensor.name).data
            assert array.nbytes == tensor.nbytes, f"{tensor.name} was announced with {tensor.nbytes} bytes"
            file.write(np.ascontiguousarray(array).data)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode(value: Any) -> tuple[int, bytes]:
    """A metadata value as its GGUF type's number and bytes."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, bool):
        return BOOL, bytes([value])
    if isinstance(value, (int, float)) and not isinstance(value, np.generic):
        value = _narrow(value)
    if isinstance(value, np.generic):
        return _number(value.dtype), value.tobytes()
    if isinstance(value, np.ndarray):
        return 9, struct.pack("<IQ", _number(value.dtype), value.size) + np.ascontiguousarray(value).tobytes()
    items = [_encode(item) for item in value]
    kind = items[0][0] if items else STRING
    assert all(item[0] == kind for item in items), "the values of a GGUF array have one type"
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)


def _narrow(value: int | float) -> np.generic:
    if isinstance(value, float):
        return np.float32(value)
    for kind in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            return kind(value)
    raise UsageError(f"{value} does not fit GGUF's integers.", "Use a number of at most 64 bits.")


def _number(dtype: np.dtype[Any]) -> int:
    """GGUF's number of a numpy type."""
    return next(number for number, name in SCALARS.items() if np.dtype(name) == dtype)
