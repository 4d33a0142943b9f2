"""What a search has done: an append-only file that survives `kill -9` at any byte.

A line is the CRC-32 of its content in hex, a space, and the content as JSON. The first holds what the search belongs
to, every other one finished action: `{"action": "score 3fa2… 0-8", "seconds": 1.2, "result": {…}}`, or an `error` in
place of the result. What follows the last sound line was being written when the process ended, and is cut off.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from miaotui.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """A finished action: its result, or the sentences of why it failed."""

    seconds: float
    result: Mapping[str, Any] | None
    error: tuple[str, str] | None = None


class Journal:
    """Finished actions by name. Opening resumes what is there; one process at a time has it open."""

    def __init__(self, path: Path, belongs_to: Mapping[str, Any], *, restart: bool = False) -> None:
        """`belongs_to` is everything that decides what the actions give. `restart` throws away what is there.

        Raises UsageError when the file belongs to another search, is no journal, or is in use.
        """
        self.path = path
        self.entries: dict[str, Entry] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            self._lock()
            self._recover(orjson.loads(orjson.dumps(dict(belongs_to))), restart)
        except BaseException:
            self._file.close()
            raise

    def add(self, action: str, entry: Entry) -> Entry:
        """Keep a finished action; it is on disk once this returns. Gives it back as it will be read."""
        assert action not in self.entries
        content: dict[str, Any] = {"action": action, "seconds": entry.seconds}
        content |= {"result": entry.result} if entry.error is None else {"error": list(entry.error)}
        data = self._append(content)
        self.entries[action] = _entry(orjson.loads(data))
        return self.entries[action]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------
    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"Another process is at work on {self.path}.", "Wait until it ends, or end it.") from error

    def _recover(self, belongs_to: dict[str, Any], restart: bool) -> None:
        self._file.seek(0)
        first = self._file.readline()
        header = _content(first)
        if header is None and first.endswith(b"\n"):
            raise UsageError(f"{self.path} is there and is no journal.", "Move it away, or choose another output.")
        if header is None or restart:
            self._file.truncate(0)
            self._append({"search": belongs_to})
            return
        self._check(header.get("search"), belongs_to)
        end = len(first)
        for line in self._file:
            content = _content(line)
            if content is None:
                break
            self.entries[content["action"]] = _entry(content)
            end += len(line)
        self._file.truncate(end)

    def _check(self, found: Any, wanted: dict[str, Any]) -> None:
        if found == wanted:
            return
        known = found if isinstance(found, dict) else {}
        changed = [name for name in wanted if known.get(name) != wanted[name]] or ["format"]
        raise UsageError(
            f"{self.path} is of another search: the {' and the '.join(changed)} changed since.",
            "Run the first command again to finish it, or give --restart to begin anew.",
        )

    def _append(self, content: Mapping[str, Any]) -> bytes:
        data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        self._file.seek(0, os.SEEK_END)
        self._file.write(b"%08x %b\n" % (zlib.crc32(data), data))
        self._file.flush()
        os.fsync(self._file.fileno())
        return data


def _entry(content: Mapping[str, Any]) -> Entry:
    error = content.get("error")
    return Entry(content["seconds"], content.get("result"), None if error is None else (error[0], error[1]))


def _content(line: bytes) -> dict[str, Any] | None:
    """A sound line's content."""
    data = line[9:-1]
    if len(line) < 11 or not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(data):
        return None
    found = orjson.loads(data)
    return found if isinstance(found, dict) else None
