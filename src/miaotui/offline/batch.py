"""The answers to a file of requests: as many at once as the engine takes, each exactly once.

Memory holds the requests that are in flight, and a few bytes for each line of the input.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from miaotui.checkpoint.write import atomic_file
from miaotui.errors import UsageError
from miaotui.offline.cache import ResultCache
from miaotui.offline.format import BadLine, Task, answered, cache_key, deterministic, failed, read_task, succeeded
from miaotui.offline.journal import Journal

Answer = Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]
"""`(url, body)` to `(HTTP status, JSON body)`; never raises but for being cancelled."""


@dataclass
class Progress:
    """How far a batch is. `before` lines were done by an earlier run of it."""

    total: int
    before: int
    done: int = 0
    failed: int = 0
    from_cache: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Source:
    """An input file as it was when the batch began."""

    path: Path
    lines: int
    sha256: str


def look_at(path: Path) -> Source:
    """Count and fingerprint the lines. Raises UsageError when the file cannot be read."""
    found = hashlib.sha256()
    lines = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                found.update(line)
                lines += bool(line.strip())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Give a file of requests, one a line.") from None
    if not lines:
        raise UsageError(f"{path} has no requests.", "Write one request a line, as JSON.")
    return Source(path, lines, found.hexdigest())


def journal_of(output: Path) -> Path:
    """Where the finished part of a batch is kept until its output is written."""
    return output.with_name(output.name + ".journal")


@dataclass
class Batch:
    """One run over `source`. `model` is the fingerprint of what answers, and `width` how many requests go at once."""

    source: Source
    journal: Journal
    answer: Answer
    model: str
    width: int
    cache: ResultCache | None = None
    tell: Callable[[Progress], None] = lambda progress: None
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(self.source.lines, self.journal.done, done=self.journal.done)
        self._seen: set[int] = set()
        """Hashes of the custom ids so far."""
        self._in_flight: dict[str, asyncio.Future[dict[str, Any] | None]] = {}

    async def run(self) -> Progress:
        """Answer every line that has no record yet. When cancelled, what is done is kept."""
        lines = self._left()
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(self.width, self.source.lines)):
                workers.create_task(self._work(lines))
        return self.progress

    async def _work(self, lines: Iterator[tuple[int, bytes, bool]]) -> None:
        for number, line, known in lines:
            record = await self._record(line, known)
            self.journal.add(number, record)
            self.progress.done += 1
            self.progress.failed += not succeeded(record)
            self.tell(self.progress)

    def _left(self) -> Iterator[tuple[int, bytes, bool]]:
        """Number and content of each line to be done, and whether its custom_id stood there before."""
        number = -1
        with open(self.source.path, "rb") as file:
            for line in file:
                if not line.strip():
                    continue
                number += 1
                known = self._known(line)
                if number not in self.journal:
                    yield number, line, known

    def _known(self, line: bytes) -> bool:
        try:
            name: str | None = read_task(line).custom_id
        except BadLine as bad:
            name = bad.custom_id
        if name is None:
            return False
        known = hash(name) in self._seen
        self._seen.add(hash(name))
        return known

    async def _record(self, line: bytes, known: bool) -> dict[str, Any]:
        try:
            task = read_task(line)
        except BadLine as bad:
            return failed(bad.custom_id, "invalid_line", str(bad))
        if known:
            message = f"The custom_id {task.custom_id!r} stands further up already."
            return failed(task.custom_id, "duplicate_custom_id", message)
        status, body = await self._answer(task)
        return answered(task.custom_id, status, body)

    async def _answer(self, task: Task) -> tuple[int, dict[str, Any]]:
        """From the cache, from the same request that is in flight, or from the engine."""
        if self.cache is None or not deterministic(task.body):
            return await self._ask(task)
        key = cache_key(self.model, task.url, task.body)
        flying = self._in_flight.get(key)
        body = self.cache.get(key) if flying is None else await asyncio.shield(flying)
        if body is not None:
            self.progress.from_cache += 1
            return 200, body
        return await self._answer_first(task, key)

    async def _ask(self, task: Task) -> tuple[int, dict[str, Any]]:
        status, body = await self.answer(task.url, task.body)
        usage = body.get("usage") or {}
        self.progress.prompt_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.progress.completion_tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0
        return status, body

    async def _answer_first(self, task: Task, key: str) -> tuple[int, dict[str, Any]]:
        assert self.cache is not None
        mine: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = mine
        kept: dict[str, Any] | None = None
        try:
            status, body = await self._ask(task)
            if status == 200:
                self.cache.put(key, body)
                kept = body
        finally:
            if self._in_flight.get(key) is mine:
                del self._in_flight[key]
            mine.set_result(kept)
        return status, body


def write_records(
    journal: Journal, output: Path, keep: Callable[[Mapping[str, Any]], bool] = lambda record: True
) -> tuple[int, int]:
    """Write the records, in the order of the input, as one file that appears whole.

    Returns how many were written, and how many of them are errors.
    """
    count = errors = 0
    with atomic_file(output) as file:
        for record in filter(keep, journal.records()):
            file.write(orjson.dumps(record) + b"\n")
            count += 1
            errors += not succeeded(record)
    return count, errors
