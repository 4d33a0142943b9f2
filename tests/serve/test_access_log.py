"""A line for each request: what it holds, and what it never does."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miaotui.serve.access_log import AccessLog
from miaotui.serve.app import create_app
from miaotui.serve.auth import Keys, RequireKey
from tests.serve.serving import MODEL, Server, raw_post, serving

KEY = {"authorization": "Bearer mt-very-secret"}
BODY = {"model": MODEL, "prompt": "confidential words", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def logs() -> dict[str, io.StringIO]:
    return {"plain": io.StringIO(), "prompts": io.StringIO()}


@pytest.fixture(scope="module")
def server(demo_gguf: Path, logs: dict[str, io.StringIO]) -> Iterator[Server]:
    def make(service: Any, settings: Any) -> Any:
        app = RequireKey(create_app(service, settings), Keys(["mt-very-secret"]), frozenset({"/health"}))
        return AccessLog(AccessLog(app, to=logs["plain"]), prompts=True, to=logs["prompts"])

    with serving(demo_gguf, make_app=make, max_num_seqs=4, max_model_len=512) as started:
        yield started


def _last(log: io.StringIO) -> dict[str, Any]:
    line = log.getvalue().splitlines()[-1]
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_a_request_leaves_a_line(server: Server, logs: dict[str, io.StringIO]) -> None:
    status, headers, _ = server.post("/v1/completions", BODY, **KEY, **{"x-request-id": "mine-7"})
    assert (status, headers["x-request-id"]) == (200, "mine-7")
    line = _last(logs["plain"])
    assert (line["request_id"], line["method"], line["path"], line["status"]) == (
        "mine-7",
        "POST",
        "/v1/completions",
        200,
    )
    assert (line["key"], line["completion_tokens"]) == ("key-1", 3)
    assert line["prompt_tokens"] >= 2
    assert line["seconds"] > 0
    assert "confidential" not in logs["plain"].getvalue()
    assert "confidential" in _last(logs["prompts"])["body"], "it was asked for"
    for log in logs.values():
        assert "very-secret" not in log.getvalue()


def test_an_id_that_could_forge_a_line_is_replaced(server: Server) -> None:
    _, headers, _ = server.post("/v1/completions", BODY, **KEY, **{"x-request-id": 'a" b'})
    assert headers["x-request-id"] != 'a" b'


def test_a_refusal_is_logged(server: Server, logs: dict[str, io.StringIO]) -> None:
    server.post("/v1/completions", BODY)
    line = _last(logs["plain"])
    assert line["status"] == 401
    assert "key" not in line


def test_signs_of_life_are_not_logged(server: Server, logs: dict[str, io.StringIO]) -> None:
    before = logs["plain"].getvalue()
    assert server.get("/health")[0] == 200
    assert logs["plain"].getvalue() == before


def test_a_client_that_leaves_is_499(server: Server, logs: dict[str, io.StringIO]) -> None:
    connection = raw_post(
        server.port, "/v1/completions", {**BODY, "max_tokens": 400}, **KEY, **{"x-request-id": "left"}
    )
    server.wait_for(lambda stats: stats.running == 1)
    connection.close()
    assert _line(logs["plain"], "left")["status"] == 499


def _line(log: io.StringIO, request_id: str) -> dict[str, Any]:
    """The line of a request, which may still be about to end."""
    end = time.monotonic() + 20
    while not (found := [line for line in log.getvalue().splitlines() if f'"{request_id}"' in line]):
        assert time.monotonic() < end, "it has no line"
        time.sleep(0.01)
    line = json.loads(found[0])
    assert isinstance(line, dict)
    return line


def test_an_answer_that_was_cut_short_says_so(server: Server, logs: dict[str, io.StringIO]) -> None:
    body = {**BODY, "max_tokens": 400, "stream": True}
    with raw_post(server.port, "/v1/completions", body, **KEY, **{"x-request-id": "cut"}) as connection:
        received = b""
        while b"data: " not in received:
            received += connection.recv(4096)
    line = _line(logs["plain"], "cut")
    assert (line["status"], line["cut_short"]) == (200, True)
    assert 1 <= line["completion_tokens"] < 400
    assert line["client"] == "127.0.0.1"


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    with serving(None, make_app=lambda *made: AccessLog(create_app(*made), to=Closed())) as started:
        assert started.get("/version")[0] == 200
