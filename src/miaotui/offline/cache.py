"""Answers of deterministic requests on disk, so that the same one is answered once."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import orjson

from miaotui.errors import ResourceError


class ResultCache:
    """Body by `format.cache_key`, in an SQLite file that several processes may share."""

    def __init__(self, folder: Path) -> None:
        """Raises ResourceError when the folder cannot hold it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(folder / "answers.sqlite", timeout=30, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(
                f"The cache {folder} cannot be used: {error}.", "Give another --cache folder."
            ) from None

    def get(self, key: str) -> dict[str, Any] | None:
        row = self._base.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else orjson.loads(row[0])

    def put(self, key: str, body: dict[str, Any]) -> None:
        self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, orjson.dumps(body)))

    def close(self) -> None:
        self._base.close()
