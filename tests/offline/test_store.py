"""A server's files and batches, with answers made up."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from miaotui.errors import ResourceError, UsageError
from miaotui.offline import store as stores
from miaotui.offline.store import BatchStore

URL = "/v1/completions"
Body = dict[str, Any]


class Answers:
    """Counts what it was asked, and answers while the gate is open."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.bodies: list[Mapping[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy: list[int] = []
        """Statuses to give first."""

    async def __call__(self, url: str, body: Mapping[str, Any]) -> tuple[int, Body]:
        self.bodies.append(body)
        if self.busy:
            return self.busy.pop(), {"error": {}}
        self.asked[str(body["prompt"])] += 1
        await asyncio.sleep(0.001)
        await self.gate.wait()
        return (400, {"error": {}}) if body["prompt"] == "bad" else (200, {"text": body["prompt"]})


@asynccontextmanager
async def _store(folder: Path, answers: Any, width: int = 4) -> AsyncIterator[BatchStore]:
    """A store that leaves as a server does: its tasks are cancelled."""
    store = BatchStore(folder, answers, width)
    try:
        yield store
    finally:
        tasks = list(store._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        store.close()


def _lines(*prompts: Any, **body: Any) -> bytes:
    tasks = [
        {"custom_id": f"n{i}", "method": "POST", "url": URL, "body": {"prompt": prompt, **body}}
        for i, prompt in enumerate(prompts)
    ]
    return b"".join(json.dumps(task).encode() + b"\n" for task in tasks)


async def _begin(store: BatchStore, content: bytes, endpoint: str = URL) -> Body:
    file = await store.add_file(io.BytesIO(content), "in.jsonl", "batch")
    return await store.create(file["id"], endpoint, "24h", None)


async def _until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.002)


async def _ended(store: BatchStore, name: str) -> Body:
    await _until(lambda: name not in store._tasks)
    entry = store.batch(name)
    assert entry is not None
    assert json.loads((store._batches.folder / f"{name}.json").read_bytes()) == entry, "the disk knows it too"
    assert not (store._batches.folder / f"{name}.journal").exists()
    return entry


def _records(store: BatchStore, name: str) -> list[Any]:
    return [json.loads(line) for line in store.content(name).read_bytes().splitlines()]


def _with(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def test_lines_wait_behind_clients(tmp_path: Path) -> None:
    async def test() -> None:
        answers = Answers()
        async with _store(tmp_path, answers) as store:
            batch = await _begin(store, _lines(*range(9)) + _lines("own", priority=-3).replace(b"n0", b"own"))
            entry = await _ended(store, batch["id"])
            assert (entry["status"], entry["request_counts"]) == (
                "completed",
                {"total": 10, "completed": 10, "failed": 0},
            )
            assert entry["error_file_id"] is None
        assert sorted(body["priority"] for body in answers.bodies) == [-3, *[1] * 9]

    _with(test)


def test_a_full_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_RETRY", 0.001)

    async def test() -> None:
        answers = Answers()
        answers.busy = [429, 503, 429]
        async with _store(tmp_path, answers) as store:
            entry = await _ended(store, (await _begin(store, _lines(*range(5))))["id"])
            assert entry["request_counts"]["completed"] == 5
        assert answers.asked.total() == 5

    _with(test)


def test_batches_share_the_width(tmp_path: Path) -> None:
    async def test() -> None:
        answers = Answers()
        answers.gate.clear()
        async with _store(tmp_path, answers, 3) as store:
            names = [(await _begin(store, _lines(*range(20))))["id"] for _ in range(3)]
            await _until(lambda: answers.asked.total() == 3)
            await asyncio.sleep(0.05)
            assert answers.asked.total() == 3
            answers.gate.set()
            for name in names:
                assert (await _ended(store, name))["status"] == "completed"

    _with(test)


# -- cancelling ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("turns", range(12))
def test_cancelled_at_any_moment(tmp_path: Path, turns: int) -> None:
    """Also before it has begun: it ends as cancelled, once, with what was done."""

    async def test() -> None:
        answers = Answers()
        answers.gate.clear()
        async with _store(tmp_path, answers) as store:
            batch = await _begin(store, _lines(*range(20)))
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            await asyncio.gather(store.cancel(batch), store.cancel(batch))
            entry = await _ended(store, batch["id"])
            assert entry["status"] == "cancelled"
            assert entry["cancelling_at"]
            assert entry["cancelled_at"]
            assert await store.cancel(entry) == entry, "nothing happens"

    _with(test)


def test_what_was_done_before_cancelling_is_kept(tmp_path: Path) -> None:
    async def test() -> None:
        answers = Answers()
        async with _store(tmp_path, answers, 1) as store:
            batch = await _begin(store, _lines("bad", *range(200)))
            await _until(lambda: batch["request_counts"]["completed"] > 3)
            answers.gate.clear()
            await store.cancel(batch)
            entry = await _ended(store, batch["id"])
            counts = entry["request_counts"]
            assert (counts["total"], counts["failed"]) == (201, 1)
            assert 3 < counts["completed"] < 200
            assert len(_records(store, entry["output_file_id"])) == counts["completed"]
            assert len(_records(store, entry["error_file_id"])) == 1

    _with(test)


def test_a_finished_batch_cannot_be_cancelled(tmp_path: Path) -> None:
    async def test() -> None:
        async with _store(tmp_path, Answers()) as store:
            entry = await _ended(store, (await _begin(store, _lines(1)))["id"])
            assert (await store.cancel(entry))["status"] == "completed"

    _with(test)


# -- from one server to the next -------------------------------------------------------------------------
def test_an_unfinished_batch_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        answers = Answers()
        async with _store(tmp_path, answers, 2) as store:
            batch = await _begin(store, _lines("bad", *range(100)))
            await _until(lambda: batch["request_counts"]["completed"] > 5)
            answers.gate.clear()
        before = answers.asked.copy()
        answers.gate.set()
        async with _store(tmp_path, answers, 2) as store:
            found = store.batch(batch["id"])
            assert found is not None
            assert found["status"] == "in_progress"
            assert store.file(found["input_file_id"]) is not None
            store.resume()
            store.resume()
            await _until(lambda: found["request_counts"]["completed"])
            assert found["request_counts"]["failed"] == 1, "those of before count"
            entry = await _ended(store, batch["id"])
            assert entry["request_counts"] == {"total": 101, "completed": 100, "failed": 1}
            assert [r["custom_id"] for r in _records(store, entry["output_file_id"])] == [
                f"n{i}" for i in range(1, 101)
            ]
        again = {prompt for prompt in answers.asked if answers.asked[prompt] > 1}
        assert len(again) <= 2, "those that were in flight"
        assert again <= set(before)

    _with(test)


def test_one_that_was_being_cancelled_is_cancelled(tmp_path: Path) -> None:
    async def test() -> None:
        answers = Answers()
        answers.gate.clear()
        async with _store(tmp_path, answers) as store:
            batch = await _begin(store, _lines(*range(9)))
            await _until(lambda: answers.asked)
        path = tmp_path / "batches" / f"{batch['id']}.json"
        path.write_text(json.dumps(batch | {"status": "cancelling"}))
        async with _store(tmp_path, answers) as store:
            store.resume()
            assert (await _ended(store, batch["id"]))["status"] == "cancelled"

    _with(test)


def test_what_was_half_written_goes_and_all_else_stays(tmp_path: Path) -> None:
    async def test() -> None:
        name = "0" * 32
        async with _store(tmp_path, Answers()) as store:
            kept = await store.add_file(io.BytesIO(b"x"), "a", "batch")
        left = [f"files/.file-{name}.abcd", f"files/file-{name}", f"batches/batch_{name}.journal"]
        left.append(f"batches/.batch_{name}.json.efgh")
        others = ["files/file-of-mine", "batches/batch_notes.txt", f"files/file-{name}.json", "files/notes.json"]
        for path in left + others:
            (tmp_path / path).write_text("x")
        async with _store(tmp_path, Answers()) as store:
            assert [entry["id"] for entry in store.files()] == [kept["id"]]
        assert not [path for path in left if (tmp_path / path).exists()]
        assert all((tmp_path / path).exists() for path in others)

    _with(test)


def test_one_server_at_a_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with _store(tmp_path, Answers()):
            with pytest.raises(UsageError, match="Another server"):
                BatchStore(tmp_path, Answers(), 1)

    _with(test)


# -- what cannot be --------------------------------------------------------------------------------------
def test_an_empty_file_is_a_failed_batch(tmp_path: Path) -> None:
    async def test() -> None:
        async with _store(tmp_path, Answers()) as store:
            entry = await _ended(store, (await _begin(store, b"\n"))["id"])
            assert entry["status"] == "failed"
            (told,) = entry["errors"]["data"]
            assert told["code"] == "invalid_input"
            assert entry["input_file_id"] in told["message"]
            assert str(tmp_path) not in told["message"], "where files lie is nobody's business"

    _with(test)


def test_a_fault_of_ours_fails_one_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(url: str, body: Mapping[str, Any]) -> tuple[int, Body]:
        raise RuntimeError("secret")

    async def test() -> None:
        async with _store(tmp_path, broken) as store:
            entry = await _ended(store, (await _begin(store, _lines(1, 2)))["id"])
            assert (entry["status"], entry["errors"]["data"][0]["code"]) == ("failed", "server_error")
            assert "secret" not in json.dumps(entry)

    _with(test)
    assert "secret" in caplog.text


def test_lines_for_another_endpoint(tmp_path: Path) -> None:
    async def test() -> None:
        answers = Answers()
        async with _store(tmp_path, answers) as store:
            entry = await _ended(store, (await _begin(store, _lines(1), "/v1/chat/completions"))["id"])
            assert entry["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
            (record,) = _records(store, entry["error_file_id"])
            assert record["response"]["body"]["error"]["code"] == "wrong_url"
        assert not answers.asked

    _with(test)


def test_there_are_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_MOST_ONGOING", 2)
    monkeypatch.setattr(stores, "_MOST_FILES", 3)

    async def test() -> None:
        answers = Answers()
        answers.gate.clear()
        async with _store(tmp_path, answers) as store:
            for _ in range(2):
                last = await _begin(store, _lines(1))
            with pytest.raises(ResourceError, match="2 batches"):
                await _begin(store, _lines(1))
            with pytest.raises(ResourceError, match="3 files"):
                await store.add_file(io.BytesIO(b""), "a", "batch")
            with pytest.raises(UsageError, match="reads"):
                await store.delete_file(last["input_file_id"])
            answers.gate.set()
            await _ended_all(store)
            await store.delete_file(last["input_file_id"])
            assert store.file(last["input_file_id"]) is None
            assert not store.content(last["input_file_id"]).exists()

    _with(test)


async def _ended_all(store: BatchStore) -> None:
    await _until(lambda: not store._tasks)
