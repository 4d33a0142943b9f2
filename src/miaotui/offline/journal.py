"""What of a batch is done: an append-only file that survives `kill -9` at any byte.

A line is the CRC-32 of its content in hex, a space, and the content, `{"line": 7, "record": {…}, "key": …}`. The first
line is the header. What follows the last sound line was being written when the process ended, and is cut off.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from miaotui.checkpoint.lines import CheckedLines
from miaotui.offline.format import succeeded


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
        self._lines = CheckedLines(
            path, "fingerprint", fingerprint, self._count, restart=restart, foreign="has part of another batch",
            remedy="Run the first command again to finish it, or give --restart to throw that work away.",
        )  # fmt: skip

    def __contains__(self, line: int) -> bool:
        return self._offsets[line] >= 0

    def add(self, line: int, record: Mapping[str, Any], key: str | None = None) -> None:
        """Keep a line's record. It is there once this returns, whatever happens to the process.

        `key` (`format.request_key`) has `find` give it to the same request.
        """
        assert line not in self
        content = {"line": line, "record": record} | ({} if key is None else {"key": key})
        self._count(content, self._lines.append(content))

    def find(self, key: str) -> dict[str, Any] | None:
        """The record of a line with the same request."""
        line = self._by_key.get(_short(key))
        if line is None:
            return None
        content = self._lines.at(self._offsets[line])
        found: dict[str, Any] | None = content["record"] if content["key"] == key else None
        return found

    def records(self, *, in_order: bool = True) -> Iterator[dict[str, Any]]:
        """All that are there, in the order of the input, or else as they were added."""
        done = (offset for offset in self._offsets if offset >= 0)
        for offset in done if in_order else sorted(done):
            yield self._lines.at(offset)["record"]

    def close(self) -> None:
        self._lines.close()

    def remove(self) -> None:
        """The batch is finished, and its output written."""
        self.path.unlink()
        self.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _count(self, content: Mapping[str, Any], offset: int) -> None:
        line = content["line"]
        self._offsets[line] = offset
        self.done += 1
        self.failed += not succeeded(content["record"])
        if "key" in content:
            self._by_key[_short(content["key"])] = line


def _short(key: str) -> int:
    return int(key[:15], 16)
