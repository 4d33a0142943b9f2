"""The answers to a file of requests: as many at once as the engine takes, each exactly once.

Memory holds the requests that are in flight, a megabyte of lines read ahead, and for each line of the input a hash of
its name, the place of its record and, where it may be asked again, a hash of its request: about 200 bytes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from miaotui.checkpoint.write import atomic_file
from miaotui.offline.cache import ResultCache
from miaotui.offline.format import BadLine, Task, answered, deterministic, failed, read_task, request_key, succeeded
from miaotui.offline.journal import Journal
from miaotui.offline.source import Source

Answer = Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]
"""`(url, body)` to `(HTTP status, JSON body)`. What it raises ends the batch."""

_AHEAD_LINES = 256
_AHEAD_BYTES = 1 << 20


@dataclass
class Progress:
    """How far a batch is. `before` lines were done by an earlier run; tokens are those of this one."""

    total: int
    before: int
    done: int
    failed: int
    reused: int = 0
    """Lines that got the answer of the same request."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def journal_of(output: Path) -> Path:
    """Where the finished part of a batch is kept until its output is written."""
    return output.with_name(output.name + ".journal")


@dataclass
class Batch:
    """One run over `source`. `model` is the fingerprint of what answers, and `width` how many requests go at once.

    Batches that share `turns` share what goes at once.
    """

    source: Source
    journal: Journal
    answer: Answer
    model: str
    width: int
    cache: ResultCache | None = None
    tell: Callable[[Progress], None] = lambda progress: None
    turns: asyncio.Semaphore | None = None
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        done = self.journal.done
        self.progress = Progress(self.source.lines, done, done, self.journal.failed)
        self._turns = self.turns or asyncio.Semaphore(self.width)
        self._lines = self._left()
        self._ahead: deque[tuple[int, Task | BadLine]] = deque()
        self._reading = asyncio.Lock()
        self._seen: set[int] = set()
        """Hashes of the custom ids so far; touched by the thread that reads alone."""
        self._in_flight: dict[str, asyncio.Future[None]] = {}
        """By key: done when the request is, however it ended."""

    async def run(self) -> Progress:
        """Answer every line that has no record yet. When this is cancelled or raises, what is done is kept.

        Raises UsageError when the source was changed meanwhile, ResourceError for the cache, OSError for the journal.
        """
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self.width, self.source.lines - self.journal.done)):
                    workers.create_task(self._work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        self.source.check()
        return self.progress

    async def _work(self) -> None:
        while True:
            async with self._turns:  # before a line is taken, so that those who wait hold none
                line = await self._next()
                if line is None:
                    return
                await self._do(*line)

    async def _do(self, number: int, task: Task | BadLine) -> None:
        key = None
        if isinstance(task, BadLine):
            record = failed(task)
        else:
            if deterministic(task.body):
                key = request_key(self.model, task.url, task.body)
            status, body = await (self._ask(task) if key is None else self._ask_once(task, key))
            record = answered(task.custom_id, status, body)
        self.journal.add(number, record, key if succeeded(record) else None)
        self.progress.done += 1
        self.progress.failed += not succeeded(record)
        self.tell(self.progress)

    # -- lines in --------------------------------------------------------------------------------------------
    async def _next(self) -> tuple[int, Task | BadLine] | None:
        async with self._reading:
            if not self._ahead:
                self._ahead.extend(await asyncio.to_thread(self._read_ahead))
            return self._ahead.popleft() if self._ahead else None

    def _read_ahead(self) -> list[tuple[int, Task | BadLine]]:
        found, size = [], 0
        for number, task, length in self._lines:
            found.append((number, task))
            size += length
            if len(found) == _AHEAD_LINES or size > _AHEAD_BYTES:
                break
        return found

    def _left(self) -> Iterator[tuple[int, Task | BadLine, int]]:
        """Number, request and length in bytes of each line that is to be done."""
        for number, line in enumerate(self.source.read()):
            if number == self.source.lines:
                self.source.check()
            task = self._understand(line)
            if number not in self.journal:
                yield number, task, len(line)

    def _understand(self, line: bytes) -> Task | BadLine:
        try:
            task: Task | BadLine = read_task(line)
        except BadLine as bad:
            task = bad
        name = task.custom_id
        if name is None:
            return task
        known = hash(name) in self._seen
        self._seen.add(hash(name))
        if known and isinstance(task, Task):
            return BadLine(f"The custom_id {name!r} stands further up already.", name, "duplicate_custom_id")
        return task

    # -- answers ---------------------------------------------------------------------------------------------
    async def _ask_once(self, task: Task, key: str) -> tuple[int, dict[str, Any]]:
        """The answer that a line further up got, or one in the cache; or ask, and have others wait for the answer."""
        while (same := self._in_flight.get(key)) is not None:
            await asyncio.shield(same)
        body = self._known(key)
        if body is not None:
            self.progress.reused += 1
            return 200, body
        self._in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            status, body = await self._ask(task)
            if status == 200 and self.cache is not None:
                self.cache.put(key, body)
            return status, body
        finally:  # whoever waits goes on after the worker, which adds the record without a pause
            self._in_flight.pop(key).set_result(None)

    def _known(self, key: str) -> dict[str, Any] | None:
        record = self.journal.find(key)
        if record is not None:
            body: dict[str, Any] = record["response"]["body"]
            return body
        return None if self.cache is None else self.cache.get(key)

    async def _ask(self, task: Task) -> tuple[int, dict[str, Any]]:
        status, body = await self.answer(task.url, task.body)
        usage = body.get("usage") or {}
        self.progress.prompt_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.progress.completion_tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0
        return status, body


def write_records(
    journal: Journal,
    output: Path,
    keep: Callable[[Mapping[str, Any]], bool] = lambda record: True,
    *,
    in_order: bool = True,
) -> int:
    """Write the records, in the order of the input or of their answers, as one file that appears whole.

    Returns how many were written.
    """
    count = 0
    with atomic_file(output) as file:
        for record in filter(keep, journal.records(in_order=in_order)):
            file.write(orjson.dumps(record) + b"\n")
            count += 1
    return count
