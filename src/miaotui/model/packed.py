"""Packed weights kept on disk, so that the next start of a large model maps them instead of packing again.

One file for each model in the cache folder, named by the checkpoint's fingerprint and the layout's version: the
weights' panels one after another, each on a page, then a JSON index, then the index's place. It is written whole or
not at all, after a load that had to pack; a file that is damaged or does not fit is passed over and replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from miaotui.backends.cpu import _native
from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.demo import cache_folder
from miaotui.checkpoint.write import atomic_file
from miaotui.errors import CheckpointError

LAYOUT = 4
"""Changes with the kernels' panel layout (native/kernels.h)."""
MAGIC = b"miaotui-packed-1"
FOOTER = struct.Struct("<QQ16s")
"""Index offset, index bytes, magic."""
PAGE = 4096
FOLDER_BOUND = 64 << 30
"""Files least recently used go when the folder would grow past this."""

log = logging.getLogger(__name__)


class PackedFile:
    """`WeightStore` over one file: reads it if it is sound, else collects what is packed for `save`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index: list[dict[str, Any]] = []
        self._bytes: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._next = 0
        self._made: list[tuple[str, _native.PackedWeight]] = []
        try:
            self._open()
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            log.warning("%s cannot be used (%s) and will be made anew.", path, error)
            self._index, self._bytes = [], None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PackedFile:
        """The file that belongs to this checkpoint, whether it is there or not."""
        key = hashlib.blake2b(f"{LAYOUT} {checkpoint.fingerprint()}".encode(), digest_size=16).hexdigest()
        return cls(cache_folder() / "packed" / f"{key}.packed")

    def _open(self) -> None:
        with self.path.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        offset, size, magic = FOOTER.unpack(data[-FOOTER.size :].tobytes())
        if magic != MAGIC or offset + size + FOOTER.size != len(data):
            raise ValueError("it ends in the wrong place")
        self._index = json.loads(data[offset : offset + size].tobytes())
        self._bytes = data
        os.utime(self.path)

    @property
    def exhausted(self) -> bool:
        return self._bytes is not None and self._next >= len(self._index)

    def take(self, description: str) -> _native.PackedWeight | None:
        if self._bytes is None:
            return None
        if self._next >= len(self._index):
            raise CheckpointError(f"{self.path} holds too few weights.", "Remove that file; it is made anew.")
        entry = self._index[self._next]
        if entry["of"] != description:
            raise CheckpointError(
                f"{self.path} does not fit this model: it holds {entry['of']} where {description} is needed.",
                "Remove that file; it is made anew at the next start.",
            )
        self._next += 1
        begin, size = entry["offset"], entry["bytes"]
        return _native.PackedWeight.mapped(tuple(entry["form"]), self._bytes[begin : begin + size])

    def put(self, description: str, weight: _native.PackedWeight) -> None:
        self._made.append((description, weight))

    def save(self) -> None:
        """Keep what this load packed, if it had to pack anything and the disk has room."""
        if not self._made:
            return
        size = sum(weight.nbytes for _, weight in self._made)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _make_room(self.path.parent, size)
            if shutil.disk_usage(self.path.parent).free < 2 * size:
                log.warning("Too little disk is free to keep %.1f GB of packed weights.", size / 1e9)
            else:
                log.warning("Keeping %.1f GB of packed weights for a quick next start: %s", size / 1e9, self.path)
                self._write()
        except OSError as error:
            log.warning("The packed weights could not be kept: %s.", error)
        self._made.clear()

    def _write(self) -> None:
        index = []
        with atomic_file(self.path) as file:
            for description, weight in self._made:
                file.write(bytes(-file.tell() % PAGE))
                index.append({"of": description, "form": weight.form, "offset": file.tell(), "bytes": weight.nbytes})
                file.write(memoryview(weight.raw))
            offset, text = file.tell(), json.dumps(index).encode()
            file.write(text + FOOTER.pack(offset, len(text), MAGIC))


def _make_room(folder: Path, size: int) -> None:
    """Remove the files longest unused until `size` more bytes fit the folder's bound."""
    files = sorted(folder.glob("*.packed"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in files)
    for path in files:
        if total + size <= FOLDER_BOUND:
            return
        total -= path.stat().st_size
        path.unlink()
