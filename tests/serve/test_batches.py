"""Files and batches through the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI

from miaotui.offline.store import BatchStore
from miaotui.serve.app import create_app
from miaotui.serve.service import Service
from miaotui.serve.settings import ServeSettings
from tests.serve.serving import MODEL, Server, serving

URL = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@contextmanager
def _serving(demo_gguf: Path, folder: Path, stores: list[BatchStore]) -> Iterator[Server]:
    def make(service: Service, settings: ServeSettings) -> Any:
        stores.append(BatchStore(folder, service.answer, 4))
        return create_app(service, settings, batches=stores[-1])

    bounds = {"max_file_bytes": 100_000}
    with serving(demo_gguf, make_app=make, settings=bounds, max_num_seqs=4, max_model_len=256) as server:
        yield server
    stores[-1].close()


@pytest.fixture(scope="module")
def server(demo_gguf: Path, folder: Path) -> Iterator[Server]:
    with _serving(demo_gguf, folder, []) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def _lines(count: int, **body: Any) -> bytes:
    asked = {"model": MODEL, "max_tokens": 3, "ignore_eos": True, **body}
    tasks = [
        {"custom_id": f"n{i}", "method": "POST", "url": URL, "body": {**asked, "prompt": f"Number {i}"}}
        for i in range(count)
    ]
    return b"".join(json.dumps(task).encode() + b"\n" for task in tasks)


def _wait(client: OpenAI, name: str, *states: str) -> Any:
    end = time.monotonic() + 60
    while (batch := client.batches.retrieve(name)).status not in states:
        assert time.monotonic() < end, batch
        time.sleep(0.02)
    return batch


def test_a_batch_from_start_to_end(client: OpenAI) -> None:
    content = _lines(30) + b"broken\n" + _lines(1, model="nobody").replace(b"n0", b"wrong")
    file = client.files.create(file=("asked.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("asked.jsonl", len(content), "batch")
    made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", metadata={"for": "me"})
    batch = _wait(client, made.id, "completed")
    assert batch.metadata == {"for": "me"}
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (32, 30, 2)
    records = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [record["custom_id"] for record in records] == [f"n{i}" for i in range(30)]
    assert all(record["response"]["body"]["usage"]["completion_tokens"] == 3 for record in records)
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert [record["error"] and record["error"]["code"] for record in errors] == ["invalid_line", None]
    assert errors[1]["response"]["status_code"] == 404
    assert batch.id in [listed.id for listed in client.batches.list(limit=1)], "pages are turned"
    assert {file.id, batch.output_file_id, batch.error_file_id} <= {listed.id for listed in client.files.list(limit=2)}
    assert client.files.delete(file.id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(file.id)


def test_a_cancelled_batch_keeps_what_is_done(client: OpenAI, server: Server) -> None:
    file = client.files.create(file=("long.jsonl", _lines(40, max_tokens=100)), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    server.wait_for(lambda stats: stats.running == 4)
    with pytest.raises(ConflictError):
        client.files.delete(file.id)
    assert client.completions.create(model=MODEL, prompt="Me", max_tokens=1).choices, "clients go first"
    client.batches.cancel(made.id)
    batch = _wait(client, made.id, "cancelled")
    assert batch.request_counts is not None
    assert batch.request_counts.completed < 40
    server.quiet()


def test_a_batch_goes_on_after_the_server(demo_gguf: Path, tmp_path: Path) -> None:
    stores: list[BatchStore] = []
    with _serving(demo_gguf, tmp_path, stores) as first, OpenAI(base_url=first.url + "/v1", api_key="none") as client:
        file = client.files.create(file=("long.jsonl", _lines(40, max_tokens=20)), purpose="batch")
        name = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id
        journal = tmp_path / "batches" / f"{name}.journal"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
            time.sleep(0.005)
    kept = journal.read_bytes()
    with _serving(demo_gguf, tmp_path, stores) as second, OpenAI(base_url=second.url + "/v1", api_key="none") as client:

        async def resume() -> None:
            stores[-1].resume()

        second.call(resume)
        batch = _wait(client, name, "completed")
        records = client.files.content(batch.output_file_id).text.splitlines()
    assert len(records) == 40
    before = [json.loads(line[9:])["record"]["id"] for line in kept.splitlines()[1:]]
    assert set(before) <= {json.loads(line)["id"] for line in records}, "what was done was not done again"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, None),
        ({"input_file_id": "file-none"}, None),
        ({"input_file_id": "../../etc/passwd"}, None),
        ({"completion_window": "1h"}, "completion_window"),
        ({"more": 1}, "more"),
    ],
)
def test_what_cannot_be_a_batch(server: Server, client: OpenAI, asked: dict[str, Any], param: str | None) -> None:
    file = client.files.create(file=("a.jsonl", _lines(1)), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": URL, "completion_window": "24h", **asked}
    assert server.error("/v1/batches", body)[:2] == (400, param)


def test_what_cannot_be_a_file(server: Server, client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="purpose"):
        client.files.create(file=("a.jsonl", b"x"), purpose="fine-tune")
    assert server.post("/v1/files", {})[0] == 415
    broken = Request(server.url + "/v1/files", b"x", {"content-type": "multipart/form-data; boundary=b"})
    assert server.ask(broken)[0] == 400
    head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    long = Request(server.url + "/v1/files", head + b"x" * 120_000, {"content-type": "multipart/form-data; boundary=b"})
    assert server.ask(long)[0] == 413


@pytest.mark.parametrize("path", ["/v1/files/none", "/v1/files/none/content", "/v1/batches/none", "/v1/files/..%2Fx"])
def test_what_is_not_there(server: Server, path: str) -> None:
    assert server.get(path)[0] == 404


def test_lists_have_bounds(server: Server) -> None:
    assert server.get("/v1/batches?limit=0")[0] == 400
    assert server.get("/v1/batches?after=none")[2]["data"] == []
