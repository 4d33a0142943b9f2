"""Files and batches of a server, in a folder that outlives it.

    files/ID.json     what OpenAI's file object says        files/ID        its content
    batches/ID.json   what OpenAI's batch object says       batches/ID.journal   what of it is done

Used on the event loop's thread. A batch that was running when the server ended goes on when `resume` is called.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miaotui.checkpoint.write import write_json
from miaotui.errors import MiaotuiError, UsageError
from miaotui.offline.batch import Answer, Batch, Progress, look_at, write_records
from miaotui.offline.format import URLS, succeeded
from miaotui.offline.journal import Journal

_log = logging.getLogger(__name__)

_BUSY = (429, 503)
_RETRY = 1.0
"""Seconds between two tries of a request that found the queue full."""
_DAY = 86400
_ONGOING = ("validating", "in_progress", "finalizing", "cancelling")


class BatchStore:
    """Keeps and runs them. `width` requests of all batches are in flight at once, behind everybody else's."""

    def __init__(self, folder: Path, answer: Answer, width: int) -> None:
        self._files = folder / "files"
        self._batches = folder / "batches"
        for made in (self._files, self._batches):
            made.mkdir(parents=True, exist_ok=True)
        self._answer = answer
        self._width = width
        self._turn = asyncio.Semaphore(width)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    # -- files -------------------------------------------------------------------------------------------
    def add_file(self, content: Path, filename: str, purpose: str) -> dict[str, Any]:
        """Take over a file that lies on the same disk or another."""
        name = f"file-{uuid.uuid4().hex}"
        shutil.move(content, self._files / name)
        return self._describe_file(name, filename, purpose)

    def _describe_file(self, name: str, filename: str, purpose: str) -> dict[str, Any]:
        entry = {
            "id": name,
            "object": "file",
            "bytes": (self._files / name).stat().st_size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        write_json(self._files / f"{name}.json", entry)
        return entry

    def files(self) -> list[dict[str, Any]]:
        """The newest first."""
        return _entries(self._files)

    def file(self, name: str) -> dict[str, Any] | None:
        return _entry(self._files, name)

    def content(self, name: str) -> Path:
        """Where the content of a file that is there lies."""
        return self._files / name

    def delete_file(self, name: str) -> None:
        """Delete one that is there. Raises UsageError while a batch reads it."""
        for batch in self.batches():
            if batch["input_file_id"] == name and batch["status"] in _ONGOING:
                raise UsageError(f"The batch {batch['id']} reads {name}.", "Cancel it first, or wait for its end.")
        (self._files / f"{name}.json").unlink(missing_ok=True)
        (self._files / name).unlink(missing_ok=True)

    # -- batches -----------------------------------------------------------------------------------------
    def create(self, input_file: str, endpoint: str, window: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
        """Begin a batch. Raises UsageError for one that could never run."""
        if endpoint not in URLS:
            raise UsageError(f"The endpoint {endpoint!r} takes no batches.", f"Choose one of {', '.join(URLS)}.")
        if self.file(input_file) is None:
            raise UsageError(f"There is no file {input_file!r}.", "Upload it to /v1/files first.")
        now = int(time.time())
        moments = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        entry: dict[str, Any] = {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + _DAY,
            **{f"{moment}_at": None for moment in moments},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": None if metadata is None else dict(metadata),
        }
        self._save(entry)
        self._start(entry)
        return entry

    def batches(self) -> list[dict[str, Any]]:
        """The newest first."""
        return _entries(self._batches)

    def batch(self, name: str) -> dict[str, Any] | None:
        return _entry(self._batches, name)

    def cancel(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Stop a batch; what it has done becomes its output."""
        task = self._tasks.get(entry["id"])
        if entry["status"] in _ONGOING and task is not None:
            self._save(entry | {"status": "cancelling", "cancelling_at": int(time.time())})
            task.cancel()
        return self.batch(entry["id"]) or entry

    def resume(self) -> None:
        """Go on with what an earlier process left unfinished."""
        for entry in self.batches():
            if entry["status"] in _ONGOING:
                self._start(entry)

    # -- a run -------------------------------------------------------------------------------------------
    def _start(self, entry: dict[str, Any]) -> None:
        task = asyncio.create_task(self._run(entry))
        self._tasks[entry["id"]] = task
        task.add_done_callback(lambda _: self._tasks.pop(entry["id"], None))

    async def _run(self, entry: dict[str, Any]) -> None:
        name = entry["id"]
        try:
            source = await asyncio.to_thread(look_at, self.content(entry["input_file_id"]))
            with Journal(self._batches / f"{name}.journal", {"input": source.sha256}, source.lines) as journal:
                entry = self._moved(entry, "in_progress")
                batch = Batch(source, journal, self._patient(entry["endpoint"]), "", self._width)
                batch.tell = lambda progress: self._count(entry, progress)
                try:
                    if entry["status"] != "cancelling":
                        await batch.run()
                except asyncio.CancelledError:
                    if (self.batch(name) or entry)["status"] != "cancelling":
                        raise  # the server ends: the next one goes on
                    entry = self.batch(name) or entry
                self._finish(entry, journal)
        except MiaotuiError as error:
            message = {"code": "invalid_input", "message": str(error), "param": None, "line": None}
            self._save(self._moved(entry, "failed") | {"errors": {"object": "list", "data": [message]}})
        except Exception:
            _log.exception("The batch %s has failed.", name)
            message = {"code": "server_error", "message": "The log says more.", "param": None, "line": None}
            self._save(self._moved(entry, "failed") | {"errors": {"object": "list", "data": [message]}})

    def _patient(self, endpoint: str) -> Answer:
        """Answers that wait their turn, behind requests of clients who wait for theirs."""

        async def answer(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
            if url != endpoint:
                message = f"The line asks {url}, and the batch is for {endpoint}."
                error = {"message": message, "type": "invalid_request_error", "param": "url", "code": "wrong_url"}
                return 400, {"error": error}
            async with self._turn:
                while True:
                    status, answered = await self._answer(url, {"priority": 1, **body})
                    if status not in _BUSY:
                        return status, answered
                    await asyncio.sleep(_RETRY)

        return answer

    def _finish(self, entry: dict[str, Any], journal: Journal) -> None:
        cancelled = entry["status"] == "cancelling"
        entry = entry if cancelled else self._moved(entry, "finalizing")
        done = journal.done
        good = self._output(entry, journal, "output", True)
        bad = self._output(entry, journal, "error", False)
        counts = {"total": entry["request_counts"]["total"] or done, "completed": good[1], "failed": bad[1]}
        entry |= {"output_file_id": good[0], "error_file_id": bad[0], "request_counts": counts}
        self._moved(entry, "cancelled" if cancelled else "completed")
        journal.remove()

    def _output(self, entry: dict[str, Any], journal: Journal, kind: str, good: bool) -> tuple[str | None, int]:
        """The records that succeeded, or those that did not, as a file; none when there are none."""
        name = f"file-{kind}-{entry['id'].removeprefix('batch_')}"
        count, _ = write_records(journal, self._files / name, lambda record: succeeded(record) is good)
        if not count:
            (self._files / name).unlink()
            return None, 0
        self._describe_file(name, f"{entry['id']}_{kind}.jsonl", "batch_output")
        return name, count

    def _count(self, entry: dict[str, Any], progress: Progress) -> None:
        entry["request_counts"] = {
            "total": progress.total,
            "completed": progress.done - progress.failed,
            "failed": progress.failed,
        }
        if progress.done % 100 == 0 or progress.done == progress.total:
            self._save(entry)

    def _moved(self, entry: dict[str, Any], status: str) -> dict[str, Any]:
        if entry["status"] == "cancelling" and status == "in_progress":
            return entry
        entry = entry | {"status": status, f"{status}_at": int(time.time())}
        self._save(entry)
        return entry

    def _save(self, entry: dict[str, Any]) -> None:
        write_json(self._batches / f"{entry['id']}.json", entry)


def _entry(folder: Path, name: str) -> dict[str, Any] | None:
    """One entry; names that clients make up never leave the folder."""
    if not name.replace("-", "").replace("_", "").isalnum():
        return None
    try:
        found = json.loads((folder / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _entries(folder: Path) -> list[dict[str, Any]]:
    found = [entry for path in folder.glob("*.json") if (entry := _entry(folder, path.stem)) is not None]
    return sorted(found, key=lambda entry: (entry["created_at"], entry["id"]), reverse=True)
