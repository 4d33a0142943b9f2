"""Files that may be hostile: mapping them, finding them beside each other, reading their JSON, all bounded."""

from __future__ import annotations

import hashlib
import json
import mmap
import stat
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from miaotui.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes a header or a JSON file may have (the bound that the safetensors reference sets)."""

MAX_JSON_OBJECTS, MAX_JSON_ITEMS = 1_000_000, 8_000_000
"""Objects and lists, and values in them, that a JSON text may have: small text can become much memory."""

OF_ONE_TENSOR = 4
"""Arrays of a file that one tensor may be made of (codes, scales, zero points, shape): read together, after the last of
them was handed out."""

AGAIN = "Download it again, or pass a file that is whole."


def damaged(path: Path, cause: str, hint: str = AGAIN) -> NoReturn:
    """Raise the one error for a file that cannot be what it says it is."""
    raise CheckpointError(f"{path} cannot be read: {cause}.", hint)


class MappedFile:
    """A regular file mapped read-only. Arrays are views of the map and keep it alive; nothing is copied.

    Pages of an array are given back to the system when `OF_ONE_TENSOR` others have been asked for, so that what is
    resident stays near the largest arrays. A view that is still held stays valid: its pages come back when touched.
    """

    def __init__(self, path: Path) -> None:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                damaged(path, "it is not a regular file")
            if status.st_size == 0:
                damaged(path, "it is empty")
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be opened: {error}.", AGAIN) from error
        self.path = path
        self.size = len(self.map)
        self.modified = status.st_mtime_ns
        self._recent: deque[tuple[int, int]] = deque()

    def array(self, start: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A read-only view; the caller has checked that it lies in the file."""
        while len(self._recent) >= OF_ONE_TENSOR:
            self._release(*self._recent.popleft())
        count = int(np.prod(shape, dtype=object))
        if count == 0:
            return np.empty(shape, dtype)
        view = np.frombuffer(self.map, dtype, count, start).reshape(shape)
        self._recent.append((start, view.nbytes))
        return view

    def _release(self, start: int, length: int) -> None:
        """Give back the memory of a part that was read; whoever reads it again has it read from the file again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self.map.madvise(mmap.MADV_DONTNEED, first, last - first)


def fingerprint(files: Iterable[tuple[MappedFile, int]]) -> str:
    """A hash of names, sizes, modification times and the first so many bytes of each file."""
    digest = hashlib.sha256()
    for file, header in files:
        digest.update(f"{file.path.name}\0{file.size}\0{file.modified}\0".encode())
        digest.update(file.map[:header])
    return digest.hexdigest()


def beside(folder: Path, name: str) -> Path | None:
    """The regular file `name` in `folder`, or None.

    Raises CheckpointError when the name leads out of the folder. A link may lead into the blobs of the Hugging
    Face cache that the folder is a snapshot of, and nowhere else.
    """
    if not name or name != Path(name).name or "\\" in name or "\0" in name or len(name.encode()) > 255:
        damaged(folder, f"it names a file outside itself, {name[:100]!r}", "Use a model folder whose files lie in it.")
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be followed: {error}.", AGAIN) from error
    if real.parent != home and not (home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"):
        damaged(path, f"it is a link that leads out of its folder, to {real}", "Put the file itself in the folder.")
    return path if real.is_file() else None


def read_json(path: Path, limit: int = MAX_HEADER) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises CheckpointError for anything else."""
    try:
        if path.stat().st_size > limit:
            damaged(path, f"it is larger than {limit} bytes")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error}.", AGAIN) from error
    return parse_json(path, raw)


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object whose keys are distinct at every level. Raises CheckpointError for anything else."""
    if raw.count(b"{") + raw.count(b"[") > MAX_JSON_OBJECTS or raw.count(b",") > MAX_JSON_ITEMS:
        damaged(path, "its JSON holds too many values")
    try:
        value = json.loads(raw, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise CheckpointError(f"{path} cannot be read: its JSON is nested too deeply.", AGAIN) from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, _distinct's and over-long integers
        raise CheckpointError(f"{path} cannot be read: its JSON is damaged ({error}).", AGAIN) from error
    if not isinstance(value, dict):
        damaged(path, "its JSON is not an object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
