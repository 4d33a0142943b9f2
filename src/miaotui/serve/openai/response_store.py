"""Answers of `/v1/responses` that can be asked for again, or gone on from: in memory, and not without bound."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 4096
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A response, and the conversation that it ended, as chat messages without the instructions."""

    response: Mapping[str, Any]
    conversation: Sequence[Mapping[str, Any]]
    size: int
    """Bytes that it takes, about."""


class ResponseStore:
    """Keeps at most `most` responses of `most_bytes` together; the oldest go first. Any thread may ask.

    An id is the leave to ask: it is long, random, and told to nobody but who asked first.
    """

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: dict[str, Stored] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def keep(self, stored: Stored) -> None:
        """Keep a response under its id; one that is larger than all may be is not."""
        if stored.size > self._most_bytes:
            return
        with self._lock:
            self._kept[str(stored.response["id"])] = stored
            self._bytes += stored.size
            while len(self._kept) > self._most or self._bytes > self._most_bytes:
                self._remove(next(iter(self._kept)))

    def get(self, response_id: str) -> Stored | None:
        with self._lock:
            return self._kept.get(response_id)

    def forget(self, response_id: str) -> bool:
        """Whether it was there."""
        with self._lock:
            if response_id not in self._kept:
                return False
            self._remove(response_id)
            return True

    def _remove(self, response_id: str) -> None:
        self._bytes -= self._kept.pop(response_id).size
