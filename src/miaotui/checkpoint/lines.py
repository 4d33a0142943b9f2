"""Long work's journal on disk: lines of JSON, each with a checksum, that are kept as they are written.

The first line says what the work is. A line that a crash left half-written is dropped with all that follows it.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from miaotui.errors import UsageError

_HEX = b"0123456789abcdef"


class CheckedLines:
    """An open journal's file, which one process at a time has: it is locked."""

    def __init__(
        self,
        path: Path,
        key: str,
        belongs_to: Mapping[str, Any],
        each: Callable[[dict[str, Any], int], None],
        *,
        foreign: str,
        remedy: str,
        restart: bool = False,
        sync: bool = False,
    ) -> None:
        """Tells `each` every line that is there, with its offset.

        belongs_to: everything that decides the work, kept under `key`. foreign: what a file of other work is called
        ("has part of another batch"), remedy: what to do about it. restart: throw away what is there, of whatever
        work. sync: a line is on the disk, and not only out of the process, once `append` returns.
        Raises UsageError where the file is of other work, is no journal, or is in use.
        """
        self.path = path
        self._sync = sync
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            self._lock()
            wanted = orjson.loads(orjson.dumps(dict(belongs_to)))
            if self._begin(key, wanted, restart):
                self._recover(each)
            elif self._header is not None:
                self._refuse(self._header.get(key), wanted, foreign, remedy)
        except BaseException:
            self._file.close()
            raise

    def append(self, content: Mapping[str, Any]) -> int:
        """Write a line; it outlives the process once this returns. Gives its offset."""
        data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        self._file.seek(0, os.SEEK_END)
        offset = self._file.tell()
        self._file.write(b"%08x %b\n" % (zlib.crc32(data), data))
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())
        return offset

    def at(self, offset: int) -> dict[str, Any]:
        """The line that begins there."""
        self._file.seek(offset)
        content = _content(self._file.readline())
        assert content is not None, "nobody else writes to a journal"
        return content

    def close(self) -> None:
        self._file.close()

    # -- opening -------------------------------------------------------------------------------------------
    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # or it was removed between the opening and the lock, by the process that finished
            raise UsageError(f"Another process is at work on {self.path}.", "Wait until it ends, or end it.")

    def _begin(self, key: str, wanted: dict[str, Any], restart: bool) -> bool:
        """Read the first line, or write it. Whether the file is of this work and has lines to be told."""
        self._file.seek(0)
        first = self._file.readline()
        self._header = _content(first)
        if self._header is None and not _is_torn(first):
            raise UsageError(f"{self.path} is there and is no journal.", "Move it away, or choose another output.")
        if self._header is None or restart:
            self._header = None
            self._file.truncate(0)
            self.append({key: wanted})
            return False
        return self._header.get(key) == wanted

    def _recover(self, each: Callable[[dict[str, Any], int], None]) -> None:
        """What is there after the first line; the end that is not sound is cut off."""
        end = self._file.tell()
        for line in self._file:
            content = _content(line)
            if content is None:
                break
            each(content, end)
            end += len(line)
        self._file.truncate(end)

    def _refuse(self, found: Any, wanted: dict[str, Any], foreign: str, remedy: str) -> None:
        known = found if isinstance(found, dict) else {}
        changed = [name for name in wanted if known.get(name) != wanted[name]] or ["format"]
        raise UsageError(f"{self.path} {foreign}: the {' and the '.join(changed)} changed since.", remedy)


def _content(line: bytes) -> dict[str, Any] | None:
    """A sound line's content."""
    data = line[9:-1]
    if len(line) < 11 or not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(data):
        return None
    found = orjson.loads(data)
    return found if isinstance(found, dict) else None


def _is_torn(line: bytes) -> bool:
    """Whether this may be a header of which the end was not written; nothing at all is one too."""
    return not line.endswith(b"\n") and not line[:8].strip(_HEX) and line[8:10] in (b"", b" ", b" {")
