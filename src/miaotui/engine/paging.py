"""Idle prefixes beyond memory: what leaves the block pool goes to a file, and comes back when it is asked for again."""

from __future__ import annotations

import dataclasses
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from miaotui import __version__
from miaotui.backends.ops import BLOCK_SIZE, Executor
from miaotui.engine.prefix_file import PrefixFile, open_prefix_file
from miaotui.model.spec import ModelSpec

PREFIX_CACHE_BYTES = 1 << 30


class FilePager:
    """A `Pager` (blocks.py) that moves blocks between an executor's cache and a file. Owns the file."""

    def __init__(self, executor: Executor, file: PrefixFile) -> None:
        self._executor = executor
        self.file = file

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.file

    def save(self, digest: bytes, block: int) -> None:
        if not self.file.touch(digest):
            self.file.put(digest, self._executor.read_block(block))

    def load(self, digest: bytes, block: int) -> bool:
        content = self.file.get(digest)
        if content is None:
            return False
        self._executor.write_block(block, content)
        return True


def open_pager(path: str | Path, size: int, executor: Executor, checkpoint: str, spec: ModelSpec) -> FilePager | None:
    """The pager of a model whose files have the fingerprint `checkpoint`. Raises what `open_prefix_file` does."""
    file = open_prefix_file(Path(path), size, executor.block_bytes, belongs_to(executor, checkpoint, spec))
    return None if file is None else FilePager(executor, file)


def belongs_to(executor: Executor, checkpoint: str, spec: ModelSpec) -> bytes:
    """32 bytes that differ wherever a block of the same tokens could hold other bytes, or the same bytes mean more."""
    digest = blake2b(digest_size=32)
    _feed(digest, (__version__, BLOCK_SIZE, executor.cache_format, checkpoint, spec))
    return digest.digest()


def _feed(digest: blake2b, value: Any) -> None:
    """A value of dataclasses, tuples, arrays and plain things, unmistakably."""
    if dataclasses.is_dataclass(value):
        _feed(digest, tuple(getattr(value, field.name) for field in dataclasses.fields(value)))
    elif isinstance(value, tuple):
        digest.update(f"({len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
        digest.update(f"{type(value).__name__}:{value!r};".encode())
