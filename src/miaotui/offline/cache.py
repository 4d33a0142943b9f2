"""Answers of deterministic requests on disk, so that the same one is answered once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from miaotui.errors import ResourceError


class ResultCache:
    """Body by `format.request_key`, in an SQLite file that several processes may share.

    Every method raises ResourceError when the file cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(folder / "answers.sqlite", timeout=30, isolation_level=None)
        try:
            with self._told():
                self._base.execute("PRAGMA journal_mode=WAL")
                self._base.execute("PRAGMA synchronous=NORMAL")
                self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID")
        except BaseException:
            self._base.close()
            raise

    def get(self, key: str) -> dict[str, Any] | None:
        with self._told():
            row = self._base.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else orjson.loads(row[0])

    def put(self, key: str, body: dict[str, Any]) -> None:
        with self._told():
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, orjson.dumps(body)))

    def close(self) -> None:
        self._base.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            cause = f"The cache {self._folder} cannot be used: {error}."
            raise ResourceError(cause, "Give another --cache folder, or delete this one.") from None
