"""What of a batch is done: an append-only file that survives `kill -9` at any byte.

A line is the CRC-32 of its content in hex, a space, and the content, `{"line": 7, "record": {…}, "key": …}`. The first
line is the header. What follows the last sound line was being written when the process ended, and is cut off.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from miaotui.errors import UsageError
from miaotui.offline.format import succeeded

_HEX = b"0123456789abcdef"


class Journal:
    """The records of `lines` input lines. Opening resumes what is there; `fingerprint` says what it belongs to.

    One process at a time has it open: it is locked.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], lines: int, *, restart: bool = False) -> None:
        """`restart` throws away what is there, of whatever batch.

        Raises UsageError when the file belongs to another batch, is no journal, or is in use.
        """
        self.path = path
        self._offsets = array("q", [-1]) * lines
        """Where each line's record begins; -1: it is still to be done."""
        self._by_key: dict[int, int] = {}
        """The line that a request was answered for, by the first bits of its key."""
        self.done = self.failed = 0
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            self._lock()
            self._recover(dict(fingerprint), restart)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, line: int) -> bool:
        return self._offsets[line] >= 0

    def add(self, line: int, record: Mapping[str, Any], key: str | None = None) -> None:
        """Keep a line's record. It is there once this returns, whatever happens to the process.

        `key` (`format.request_key`) has `find` give it to the same request.
        """
        assert line not in self
        content = {"line": line, "record": record} | ({} if key is None else {"key": key})
        self._count(content, self._append(content))

    def find(self, key: str) -> dict[str, Any] | None:
        """The record of a line with the same request."""
        line = self._by_key.get(_short(key))
        if line is None:
            return None
        content = self._at(self._offsets[line])
        found: dict[str, Any] | None = content["record"] if content["key"] == key else None
        return found

    def records(self, *, in_order: bool = True) -> Iterator[dict[str, Any]]:
        """All that are there, in the order of the input, or else as they were added."""
        done = (offset for offset in self._offsets if offset >= 0)
        for offset in done if in_order else sorted(done):
            yield self._at(offset)["record"]

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The batch is finished, and its output written."""
        self.path.unlink()
        self.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- opening -------------------------------------------------------------------------------------------
    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # or it was removed between the opening and the lock, by the process that finished
            raise UsageError(f"Another process is at work on {self.path}.", "Wait until it ends, or end it.")

    def _recover(self, fingerprint: dict[str, str], restart: bool) -> None:
        self._file.seek(0)
        first = self._file.readline()
        header = _content(first)
        if header is None and not _is_torn(first):
            raise UsageError(f"{self.path} is there and is no journal.", "Move it away, or choose another output.")
        if header is None or restart:
            self._file.truncate(0)
            self._append({"fingerprint": fingerprint})
            return
        self._check(header.get("fingerprint"), fingerprint)
        end = len(first)
        for line in self._file:
            content = _content(line)
            if content is None:
                break
            self._count(content, end)
            end += len(line)
        self._file.truncate(end)

    def _check(self, found: Any, wanted: dict[str, str]) -> None:
        if found == wanted:
            return
        known = found if isinstance(found, dict) else {}
        changed = [name for name in wanted if known.get(name) != wanted[name]] or ["format"]
        raise UsageError(
            f"{self.path} has part of another batch: the {' and the '.join(changed)} changed since.",
            "Run the first command again to finish it, or give --restart to throw that work away.",
        )

    def _count(self, content: Mapping[str, Any], offset: int) -> None:
        line = content["line"]
        self._offsets[line] = offset
        self.done += 1
        self.failed += not succeeded(content["record"])
        if "key" in content:
            self._by_key[_short(content["key"])] = line

    # -- lines ---------------------------------------------------------------------------------------------
    def _append(self, content: Mapping[str, Any]) -> int:
        data = orjson.dumps(content)
        self._file.seek(0, os.SEEK_END)
        offset = self._file.tell()
        self._file.write(b"%08x %b\n" % (zlib.crc32(data), data))
        self._file.flush()
        return offset

    def _at(self, offset: int) -> dict[str, Any]:
        self._file.seek(offset)
        content = _content(self._file.readline())
        assert content is not None, "nobody else writes to a journal"
        return content


def _content(line: bytes) -> dict[str, Any] | None:
    """A sound line's content."""
    if len(line) < 11 or not line.endswith(b"\n"):
        return None
    data = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(data):
        return None
    found = orjson.loads(data)
    return found if isinstance(found, dict) else None


def _is_torn(line: bytes) -> bool:
    """Whether this may be a header of which the end was not written; nothing at all is one too."""
    return not line.endswith(b"\n") and not line[:8].strip(_HEX) and line[8:10] in (b"", b" ", b" {")


def _short(key: str) -> int:
    return int(key[:15], 16)
