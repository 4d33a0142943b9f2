"""The input of a batch: a file that is read line by line, and must stay as it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from miaotui.errors import UsageError
from miaotui.offline.format import LONGEST_LINE


@dataclass(frozen=True)
class Source:
    """An input file as it was when the batch began. `lines` counts those that are not blank."""

    path: Path
    lines: int
    sha256: str
    stamp: tuple[int, int]
    """Size in bytes and time of the last change in nanoseconds."""

    def read(self) -> Iterator[bytes]:
        """The lines that are not blank. Of one beyond LONGEST_LINE only so much is given that it shows."""
        return _lines(self.path)

    def check(self) -> None:
        """Raise UsageError when the file was changed since."""
        if _stamp(self.path) != self.stamp:
            cause = f"{self.path} was changed while it was being answered."
            raise UsageError(cause, "Leave it alone, and answer it anew with --restart.")


def look_at(path: Path) -> Source:
    """Fingerprint a file and count its lines. Raises UsageError when it cannot be read, or asks nothing."""
    hint = "Give a file of requests, one a line."
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file.", hint)
        stamp = _stamp(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines = sum(1 for _ in _lines(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", hint) from None
    if not lines:
        raise UsageError(f"{path} has no requests.", "Write one request a line, as JSON.")
    return Source(path, lines, digest, stamp)


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            more = line
            while len(more) > LONGEST_LINE and not more.endswith(b"\n"):
                more = file.readline(LONGEST_LINE + 1)
            if line.strip():
                yield line


def _stamp(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
