"""Files and batches of a server, in a folder that outlives it.

    files/ID.json     what OpenAI's file object says        files/ID             its content
    batches/ID.json   what OpenAI's batch object says       batches/ID.journal   what of it is done

Used on the event loop's thread. A batch that was running when the server ended goes on when `resume` is called.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from miaotui.checkpoint.write import atomic_file
from miaotui.errors import MiaotuiError, ResourceError, UsageError
from miaotui.offline.batch import Answer, Batch, Progress, write_records
from miaotui.offline.entries import Entries, Entry
from miaotui.offline.format import URLS, succeeded
from miaotui.offline.journal import Journal
from miaotui.offline.source import look_at

_log = logging.getLogger(__name__)

_MOST_FILES = 10_000
_MOST_ONGOING = 32
"""Batches that may be unfinished at a time."""
_BUSY = (429, 503)
_RETRY = 1.0
"""Seconds between two tries of a request that found the queue full, or the model not there yet."""
_LAST = 1
"""The priority of a line that states none: behind the requests of clients who wait for their answers."""
_ONGOING = ("validating", "in_progress", "finalizing", "cancelling")
_OURS = re.compile(r"\.?(file-(output-|error-)?|batch_)[0-9a-f]{32}(\.|$)")
"""Names of files that the store, and nobody else, has made."""
_MOMENTS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class BatchStore:
    """Keeps and runs them. `width` requests of all batches are in flight at once. `close` it at the end."""

    def __init__(self, folder: Path, answer: Answer, width: int) -> None:
        """Raises UsageError when another server uses the folder."""
        self._files = Entries(folder / "files")
        self._batches = Entries(folder / "batches")
        self._lock = _lock(folder)
        self._tidy()
        self._answer = answer
        self._width = width
        self._turns = asyncio.Semaphore(width)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By the batch's id."""
        self._answering: dict[str, asyncio.Task[Progress]] = {}
        """The part of a batch that can be cancelled."""

    def close(self) -> None:
        """Leave the folder to others."""
        self._lock.close()

    def _tidy(self) -> None:
        """Remove what an earlier process had not finished writing, or removing."""
        ongoing = {entry["id"] for entry in self.batches() if entry["status"] in _ONGOING}
        wanted = {entry["id"] for entry in self.files()} | {f"{name}.journal" for name in ongoing}
        for folder in (self._files.folder, self._batches.folder):
            for path in folder.iterdir():
                if _OURS.match(path.name) and path.suffix != ".json" and path.name not in wanted:
                    path.unlink()

    # -- files -------------------------------------------------------------------------------------------
    async def add_file(self, content: IO[bytes], filename: str, purpose: str) -> Entry:
        """Keep what `content` has from where it stands. Raises ResourceError when there are too many files."""
        if len(self._files) >= _MOST_FILES:
            raise ResourceError(f"There are {len(self._files)} files already.", "Delete some of them first.")
        name = f"file-{uuid.uuid4().hex}"
        await asyncio.to_thread(_copy, content, self._files.folder / name)
        return await self._describe_file(name, filename, purpose)

    async def _describe_file(self, name: str, filename: str, purpose: str) -> Entry:
        entry = {
            "id": name,
            "object": "file",
            "bytes": (self._files.folder / name).stat().st_size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        await self._files.save(entry)
        return entry

    def files(self) -> list[Entry]:
        """The newest first."""
        return self._files.newest_first()

    def file(self, name: str) -> Entry | None:
        return self._files.get(name)

    def content(self, name: str) -> Path:
        """Where the content of a file that is there lies."""
        return self._files.folder / name

    async def delete_file(self, name: str) -> None:
        """Delete one that is there. Raises UsageError while a batch reads it."""
        for batch in self.batches():
            if batch["input_file_id"] == name and batch["status"] in _ONGOING:
                raise UsageError(f"The batch {batch['id']} reads {name}.", "Cancel it first, or wait for its end.")
        await self._files.remove(name)
        self.content(name).unlink(missing_ok=True)

    # -- batches -----------------------------------------------------------------------------------------
    async def create(self, input_file: str, endpoint: str, window: str, metadata: Mapping[str, str] | None) -> Entry:
        """Begin a batch, which takes the time it takes: it never expires.

        Raises UsageError for one that could never run, ResourceError when too many are unfinished.
        """
        if endpoint not in URLS:
            raise UsageError(f"The endpoint {endpoint!r} takes no batches.", f"Choose one of {', '.join(URLS)}.")
        if self.file(input_file) is None:
            raise UsageError(f"There is no file {input_file!r}.", "Upload it to /v1/files first.")
        if len(self._tasks) >= _MOST_ONGOING:
            raise ResourceError(f"{len(self._tasks)} batches are unfinished.", "Wait for one to end, or cancel it.")
        entry: Entry = {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            "expires_at": None,
            **{f"{moment}_at": None for moment in _MOMENTS},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": None if metadata is None else dict(metadata),
        }
        await self._batches.save(entry)
        self._start(entry)
        return entry

    def batches(self) -> list[Entry]:
        """The newest first."""
        return self._batches.newest_first()

    def batch(self, name: str) -> Entry | None:
        return self._batches.get(name)

    async def cancel(self, entry: Entry) -> Entry:
        """Stop a batch; what it has done becomes its output. One that is finished stays as it is."""
        if entry["status"] in ("validating", "in_progress"):
            await self._move(entry, "cancelling")
            if entry["id"] in self._answering:
                self._answering[entry["id"]].cancel()
        return entry

    def resume(self) -> None:
        """Go on with what an earlier process left unfinished."""
        for entry in reversed(self.batches()):
            if entry["status"] in _ONGOING and entry["id"] not in self._tasks:
                self._start(entry)

    # -- a run -------------------------------------------------------------------------------------------
    def _start(self, entry: Entry) -> None:
        name = entry["id"]
        self._tasks[name] = asyncio.create_task(self._run(entry))
        self._tasks[name].add_done_callback(lambda _: self._tasks.pop(name))

    async def _run(self, entry: Entry) -> None:
        path = self._batches.folder / f"{entry['id']}.journal"
        content = self.content(entry["input_file_id"])
        try:
            source = await asyncio.to_thread(look_at, content)
            entry["request_counts"]["total"] = source.lines
            with await asyncio.to_thread(Journal, path, {"input": source.sha256}, source.lines) as journal:
                batch = Batch(source, journal, self._patient(entry["endpoint"]), "", self._width, turns=self._turns)
                batch.tell = lambda progress: _count(entry, progress)
                if entry["status"] != "cancelling":
                    await self._move(entry, "in_progress")
                if entry["status"] != "cancelling":  # which may have come while that was saved
                    await self._answer_lines(entry["id"], batch)
                await self._finish(entry, journal)
                journal.remove()
        except Exception as error:
            known = isinstance(error, MiaotuiError)
            if not known:
                _log.exception("The batch %s has failed.", entry["id"])
            code, message = ("invalid_input", str(error)) if known else ("server_error", "The server's log says more.")
            message = message.replace(str(content), content.name)  # where it lies is nobody's business
            told = {"code": code, "message": message, "param": None, "line": None}
            entry["errors"] = {"object": "list", "data": [told]}
            await self._move(entry, "failed")
            path.unlink(missing_ok=True)

    async def _answer_lines(self, name: str, batch: Batch) -> None:
        """Until all are answered or the batch is cancelled. To be cancelled oneself is the end of the server."""
        self._answering[name] = answering = asyncio.create_task(batch.run())
        try:
            await asyncio.wait([answering])
        finally:
            del self._answering[name]
            answering.cancel()
            await asyncio.wait([answering])  # nothing may write to the journal any more
        if not answering.cancelled():
            answering.result()

    def _patient(self, endpoint: str) -> Answer:
        """Answers that wait their turn."""

        async def answer(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
            if url != endpoint:
                message = f"The line asks {url}, and the batch is for {endpoint}."
                error = {"message": message, "type": "invalid_request_error", "param": "url", "code": "wrong_url"}
                return 400, {"error": error}
            while True:
                status, answered = await self._answer(url, {"priority": _LAST, **body})
                if status not in _BUSY:
                    return status, answered
                await asyncio.sleep(_RETRY)

        return answer

    async def _finish(self, entry: Entry, journal: Journal) -> None:
        """Make the output; after a crash in between it is made again, under the same names."""
        cancelled = entry["status"] == "cancelling"
        if not cancelled:
            await self._move(entry, "finalizing")
        entry["output_file_id"], completed = await self._output(entry, journal, "output", good=True)
        entry["error_file_id"], failed = await self._output(entry, journal, "error", good=False)
        entry["request_counts"].update(completed=completed, failed=failed)
        await self._move(entry, "cancelled" if cancelled else "completed")

    async def _output(self, entry: Entry, journal: Journal, kind: str, *, good: bool) -> tuple[str | None, int]:
        """The records that succeeded, or those that did not, as a file; none when there are none."""
        count = journal.done - journal.failed if good else journal.failed
        if not count:
            return None, 0
        name = f"file-{kind}-{entry['id'].removeprefix('batch_')}"
        path = self._files.folder / name
        await asyncio.to_thread(write_records, journal, path, lambda record: succeeded(record) is good)
        await self._describe_file(name, f"{entry['id']}_{kind}.jsonl", "batch_output")
        return name, count

    async def _move(self, entry: Entry, status: str) -> None:
        entry["status"] = status
        entry[f"{status}_at"] = int(time.time())
        await self._batches.save(entry)


def _count(entry: Entry, progress: Progress) -> None:
    entry["request_counts"].update(completed=progress.done - progress.failed, failed=progress.failed)


def _copy(content: IO[bytes], path: Path) -> None:
    with atomic_file(path) as file:
        shutil.copyfileobj(content, file, 1 << 20)


def _lock(folder: Path) -> IO[bytes]:
    file = open(folder / "lock", "ab")  # noqa: SIM115 - closed by the store
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f"Another server uses {folder}.", "End it, or choose another --batch-dir.") from None
    return file
