"""A file of KV cache blocks, found again by the hash of the prefix they belong to. It outlives the process.

    header    4096 bytes: magic, version, what the blocks belong to, bytes of a block, number of slots, checksum
    records   32 bytes a slot: hash, age stamp, checksum of the slot, checksum of the record
    slots     one block each

A slot is overwritten in the order: record cleared, block, record. So whatever moment a crash picks, a record either
fails its own checksum or vouches for its slot's. Blocks are read through a memory map, which makes the page cache a
second tier of memory, and written by `write`, which can report a full disk where a map could only be killed for it.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from miaotui.errors import ResourceError, UsageError

Bytes = NDArray[np.uint8]

_MAGIC = b"miaotui prefixes"
_HEADER = struct.Struct("<16sI32sQQ")
_HEADER_BYTES = 4096
_RECORD = struct.Struct("<16sQI")
_RECORD_BYTES = _RECORD.size + 4
_VERSION = 1

_log = logging.getLogger(__name__)


class PrefixFile:
    """The blocks in one file, the least recently used giving way to new ones. One process at a time."""

    def __init__(self, path: Path, file: BinaryIO, slots: int, block_bytes: int) -> None:
        """Use `open_prefix_file`."""
        self.path = path
        self.slots = slots
        self.block_bytes = block_bytes
        self.saved = self.found = 0
        """Blocks written to the file, and read back from it."""
        self._file = file
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        self._stamp = 0
        self._full_disk = False
        self._read_records()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def touch(self, digest: bytes) -> bool:
        """Note that a block was of use. False when it is not here."""
        if digest not in self._slot_of:
            return False
        self._slot_of.move_to_end(digest)
        return True

    def put(self, digest: bytes, block: Bytes) -> None:
        """Keep a block that is not here yet. A disk that is full is said once; the block is dropped."""
        assert digest not in self._slot_of
        slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
        self._stamp += 1
        try:
            self._write(self._record_at(slot), bytes(_RECORD_BYTES))
            self._write(self._slot_at(slot), block.data)
            self._write(self._record_at(slot), _record(digest, self._stamp, zlib.crc32(block.data)))
        except OSError as error:
            self._free.append(slot)
            if not self._full_disk:
                self._full_disk = True
                _log.warning("The prefix cache file %s cannot grow: %s.", self.path, error.strerror)
            return
        self._slot_of[digest] = slot
        self.saved += 1

    def get(self, digest: bytes) -> Bytes | None:
        """The block of a hash, a view that is valid until the next `put`; None when it is not here or is damaged."""
        slot = self._slot_of.get(digest)
        if slot is None:
            return None
        block = np.frombuffer(self._map, np.uint8, self.block_bytes, self._slot_at(slot))
        if zlib.crc32(block.data) != self._checksum(slot):
            del self._slot_of[digest]
            self._free.append(slot)
            return None
        self._slot_of.move_to_end(digest)
        self.found += 1
        return block

    def close(self) -> None:
        """Write down the order of use and let go of the file."""
        try:
            for digest, slot in self._slot_of.items():
                self._stamp += 1
                self._write(self._record_at(slot), _record(digest, self._stamp, self._checksum(slot)))
        except OSError as error:
            _log.warning("The prefix cache file %s cannot be written: %s.", self.path, error.strerror)
        self._map.close()
        self._file.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the index agrees with the records, and every slot is used or free."""
        used = list(self._slot_of.values())
        assert sorted(used + self._free) == list(range(self.slots)), "a slot is lost, or used twice"
        for digest, slot in self._slot_of.items():
            found = _parse(self._map[self._record_at(slot) : self._record_at(slot) + _RECORD_BYTES])
            assert found is not None, "a record is damaged"
            assert found[0] == digest, "a record names another hash"

    def _read_records(self) -> None:
        """Take over the sound records, the oldest first. A hash that is there twice counts once."""
        sound: list[tuple[int, bytes, int]] = []
        for slot in range(self.slots):
            found = _parse(self._map[self._record_at(slot) : self._record_at(slot) + _RECORD_BYTES])
            if found is not None:
                sound.append((found[1], found[0], slot))
        for stamp, digest, slot in sorted(sound):
            self._slot_of[digest] = slot
            self._slot_of.move_to_end(digest)
            self._stamp = stamp
        used = set(self._slot_of.values())
        self._free = [slot for slot in range(self.slots - 1, -1, -1) if slot not in used]

    def _record_at(self, slot: int) -> int:
        return _HEADER_BYTES + slot * _RECORD_BYTES

    def _slot_at(self, slot: int) -> int:
        return _HEADER_BYTES + self.slots * _RECORD_BYTES + slot * self.block_bytes

    def _checksum(self, slot: int) -> int:
        """Of the slot's block, as its record has it."""
        checksum: int = _RECORD.unpack_from(self._map, self._record_at(slot))[2]
        return checksum

    def _write(self, at: int, content: bytes | memoryview) -> None:
        self._file.seek(at)
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]


def open_prefix_file(path: Path, size: int, block_bytes: int, belongs_to: bytes) -> PrefixFile | None:
    """The file at `path`, made when there is none; at most `size` bytes. `belongs_to`: 32 bytes that name the model.

    What is damaged, or belongs to another model or size, is replaced; that is logged. None, also logged, when another
    process has it. Raises UsageError for a file of another kind, or a size without room for a block; ResourceError
    when it cannot be opened.
    """
    slots = (size - _HEADER_BYTES) // (block_bytes + _RECORD_BYTES)
    if slots < 1:
        raise UsageError(
            f"A prefix cache of {size} bytes has no room for a block of {block_bytes} bytes.",
            "Raise prefix_cache_bytes.",
        )
    try:
        # Readable by its owner alone, for it holds what was asked.
        file: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o600), "r+b", buffering=0)
        try:
            if _lock(file):
                _prepare(path, file, slots, block_bytes, belongs_to)
                return PrefixFile(path, file, slots, block_bytes)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise ResourceError(
            f"The prefix cache file {path} cannot be used: {error.strerror or error}.",
            "Choose a path that can be written, with room on its disk.",
        ) from error
    file.close()
    _log.warning("The prefix cache file %s is in use by another process: going on without it.", path)
    return None


_BINARY = getattr(os, "O_BINARY", 0)


def _prepare(path: Path, file: BinaryIO, slots: int, block_bytes: int, belongs_to: bytes) -> None:
    """Make the file ours: as it is when its header fits, else emptied."""
    header = _HEADER.pack(_MAGIC, _VERSION, belongs_to, block_bytes, slots)
    header += struct.pack("<I", zlib.crc32(header))
    whole = _HEADER_BYTES + slots * (_RECORD_BYTES + block_bytes)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found = file.read(len(header)) or b""
    if found == header and size == whole:
        return
    if size and not found.startswith(_MAGIC):
        raise UsageError(f"{path} exists and is no prefix cache.", "Choose another path, or remove the file.")
    if size:
        sound = len(found) == len(header) and found[-4:] == struct.pack("<I", zlib.crc32(found[:-4]))
        why = "belongs to another model, setting or size" if sound and size == _whole(found) else "is damaged"
        _log.warning("The prefix cache file %s %s: it is begun anew.", path, why)
    file.truncate(0)
    file.seek(0)
    file.write(header)
    file.truncate(whole)


def _whole(header: bytes) -> int:
    """Bytes of the whole file that a sound header speaks of."""
    *_, block_bytes, slots = _HEADER.unpack_from(header)
    return int(_HEADER_BYTES + slots * (_RECORD_BYTES + block_bytes))


def _lock(file: BinaryIO) -> bool:
    """Whether the file is now this process's alone, until it is closed. Where there are no locks, it is believed."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _record(digest: bytes, stamp: int, checksum: int) -> bytes:
    record = _RECORD.pack(digest, stamp, checksum)
    return record + struct.pack("<I", zlib.crc32(record))


def _parse(record: bytes) -> tuple[bytes, int] | None:
    """(hash, stamp) of a record; None when it fails its checksum, as an empty one does."""
    if record[_RECORD.size :] != struct.pack("<I", zlib.crc32(record[: _RECORD.size])):
        return None
    digest, stamp, _ = _RECORD.unpack_from(record)
    return digest, stamp
