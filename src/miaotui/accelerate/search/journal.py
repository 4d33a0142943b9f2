"""What a search has done: an append-only file that survives `kill -9` at any byte.

A line is the CRC-32 of its content in hex, a space, and the content as JSON. The first holds what the search belongs
to, every other one finished action: `{"action": "score 3fa2… 0-8", "seconds": 1.2, "result": {…}}`, or an `error` in
place of the result. What follows the last sound line was being written when the process ended, and is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from miaotui.checkpoint.lines import CheckedLines


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
        self._lines = CheckedLines(
            path, "search", belongs_to, self._keep, restart=restart, sync=True, foreign="is of another search",
            remedy="Run the first command again to finish it, or give --restart to begin anew.",
        )  # fmt: skip

    def add(self, action: str, entry: Entry) -> Entry:
        """Keep a finished action; it is on disk once this returns. Gives it back as it will be read."""
        assert action not in self.entries
        content: dict[str, Any] = {"action": action, "seconds": entry.seconds}
        content |= {"result": entry.result} if entry.error is None else {"error": list(entry.error)}
        offset = self._lines.append(content)
        self._keep(self._lines.at(offset), offset)
        return self.entries[action]

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _keep(self, content: Mapping[str, Any], offset: int) -> None:
        self.entries[content["action"]] = _entry(content)


def _entry(content: Mapping[str, Any]) -> Entry:
    error = content.get("error")
    return Entry(content["seconds"], content.get("result"), None if error is None else (error[0], error[1]))
