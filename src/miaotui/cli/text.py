"""Text that comes from outside: arguments and stdin, whose bytes may be anything."""

from __future__ import annotations

import os
import sys

from miaotui.errors import UsageError


def argument(text: str, what: str) -> str:
    """An argument as UTF-8, whatever the locale made of it. Raises UsageError when it is not."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise UsageError(f"{what} is not UTF-8 text.", "Give it in UTF-8, or pipe it in.") from error


def piped() -> str:
    """All of stdin; empty when it is a terminal or closed. Raises UsageError when it is not UTF-8."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"What is piped in is not UTF-8 text (byte {error.start}).",
            "Convert it: iconv -f <its encoding> -t UTF-8 FILE.",
        ) from error
