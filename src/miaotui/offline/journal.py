"""What of a batch is done: an append-only file that survives `kill -9` at any byte.

A line is the CRC-32 of its content in hex, a space, and the content: `{"line": 7, "record": {…}}`. The first line is
the header. What follows the last sound line was being written when the process ended, and is cut off.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from miaotui.errors import UsageError


class Journal:
    """The records of `lines` input lines. Opening resumes what is there; `fingerprint` says what it belongs to."""

    def __init__(self, path: Path, fingerprint: Mapping[str, str], lines: int) -> None:
        """Raises UsageError when the file belongs to another batch."""
        self.path = path
        self._offsets = array("q", [-1]) * lines
        """Where each line's record begins; -1: it is still to be done."""
        self.done = 0
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            self._recover(dict(fingerprint))
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, line: int) -> bool:
        return self._offsets[line] >= 0

    def add(self, line: int, record: Mapping[str, Any]) -> None:
        """Keep a line's record. It is there once this returns, whatever happens to the process."""
        assert line not in self
        self._offsets[line] = self._append({"line": line, "record": record})
        self.done += 1

    def records(self) -> Iterator[dict[str, Any]]:
        """All that are there, in the order of the input."""
        for offset in self._offsets:
            if offset >= 0:
                self._file.seek(offset)
                content = _content(self._file.readline())
                assert content is not None
                yield content["record"]

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The batch is finished, and its output written."""
        self.close()
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _recover(self, fingerprint: dict[str, str]) -> None:
        self._file.seek(0)
        end = 0
        for line in self._file:
            content = _content(line)
            if content is None:
                break
            if end == 0:
                self._check(content.get("fingerprint"), fingerprint)
            elif content["line"] not in self:
                self._offsets[content["line"]] = end
                self.done += 1
            end += len(line)
        self._file.truncate(end)
        if end == 0:
            self._append({"fingerprint": fingerprint})

    def _check(self, found: Any, wanted: dict[str, str]) -> None:
        if found == wanted:
            return
        known = found if isinstance(found, dict) else {}
        changed = [name for name in wanted if known.get(name) != wanted[name]] or ["format"]
        raise UsageError(
            f"{self.path} has part of another batch: the {' and the '.join(changed)} changed since.",
            "Run the first command again to finish it, or give --restart to throw that work away.",
        )

    def _append(self, content: Mapping[str, Any]) -> int:
        data = orjson.dumps(content)
        self._file.seek(0, os.SEEK_END)
        offset = self._file.tell()
        self._file.write(b"%08x %b\n" % (zlib.crc32(data), data))
        self._file.flush()
        return offset


def _content(line: bytes) -> dict[str, Any] | None:
    """A sound line's content."""
    if len(line) < 11 or not line.endswith(b"\n"):
        return None
    data = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(data):
        return None
    found = orjson.loads(data)
    return found if isinstance(found, dict) else None
