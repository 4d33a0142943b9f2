"""Clients that leave, queues that are full, deadlines, steps that fail, and the server's own beginning and end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.serve.serving import MODEL, Server, raw_post, serving

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(demo_gguf: Path) -> Iterator[Server]:
    """Two seats in a step, and one for who waits."""
    with serving(demo_gguf, settings={"max_queue": 1}, max_num_seqs=2, max_model_len=1024) as started:
        yield started
        started.quiet()


# -- clients that leave ----------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled(small: Server, stream: bool) -> None:
    """Also one that waits for a seat. Its blocks are free long before 900 tokens could have been made."""
    connections = [raw_post(small.port, "/v1/completions", {**LONG, "stream": stream}) for _ in range(3)]
    small.wait_for(lambda stats: (stats.running, stats.waiting) == (2, 1))
    made = small.service.model.engine.stats.generated_tokens  # type: ignore[union-attr]
    for connection in connections:
        connection.close()
    small.quiet()
    assert small.service.model.engine.stats.generated_tokens - made < 900  # type: ignore[union-attr]


def test_clients_that_leave_at_any_moment(small: Server) -> None:
    """Random requests, closed at random moments; whatever happens, nothing is left behind."""
    dice = random.Random(5)
    for _ in range(15):
        body = {
            **LONG,
            "stream": dice.random() < 0.7,
            "n": dice.choice([1, 2]),
            "prompt": "word " * dice.randint(1, 300),
        }
        connection = raw_post(small.port, "/v1/completions", body)
        if dice.random() < 0.5:
            connection.settimeout(dice.choice([0.01, 0.1, 0.3]))
            with suppress(TimeoutError):
                while connection.recv(dice.choice([1, 4096])):
                    pass
        connection.close()
    small.quiet()


def test_half_a_request_is_no_request(small: Server) -> None:
    connection = socket.create_connection(("127.0.0.1", small.port))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n"
    connection.sendall(head + b'{"prompt"')
    time.sleep(0.05)
    connection.close()
    small.quiet()
    assert small.get("/ready")[0] == 200


def test_a_slow_reader_delays_nobody_and_gets_all(small: Server) -> None:
    connection = raw_post(small.port, "/v1/completions", {**LONG, "stream": True})
    small.wait_for(lambda stats: stats.running == 1)
    assert small.post("/v1/completions", {**LONG, "max_tokens": 3})[0] == 200
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += connection.recv(1 << 16)
    connection.close()
    assert received.count(b'"finish_reason":"length"') == 1


# -- bounds ----------------------------------------------------------------------------------------------
def test_a_full_queue_refuses_and_says_when(small: Server) -> None:
    connections = [raw_post(small.port, "/v1/completions", LONG) for _ in range(3)]
    small.wait_for(lambda stats: (stats.running, stats.waiting) == (2, 1))
    status, headers, answer = small.post("/v1/completions", LONG)
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1
    assert small.get("/ready")[2] == {"status": "queue full"}
    assert small.get("/health")[0] == 200
    with OpenAI(base_url=f"{small.url}/v1", api_key="x", max_retries=0) as client, pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="x")
    for connection in connections:
        connection.close()
    small.quiet()
    assert small.post("/v1/completions", {**LONG, "max_tokens": 2})[0] == 200


def test_more_sequences_than_there_ever_are(small: Server) -> None:
    assert small.error("/v1/completions", {**LONG, "prompt": ["a"] * 4})[:2] == (400, "n")
    assert small.post("/v1/completions", {**LONG, "prompt": ["a"] * 3, "max_tokens": 2})[0] == 200


def test_a_body_has_a_bound(demo_gguf: Path) -> None:
    with serving(demo_gguf, settings={"max_body_bytes": 2000}, max_model_len=256) as server:
        assert server.error("/v1/completions", {"prompt": "x" * 3000})[0] == 413
        chunked = socket.create_connection(("127.0.0.1", server.port))
        chunked.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"x" * 1000 + b"\r\n"
        )
        chunked.sendall((b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 3)
        assert b" 413 " in chunked.recv(4096).split(b"\r\n")[0]
        chunked.close()
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_a_deadline_ends_a_request(demo_gguf: Path) -> None:
    with serving(demo_gguf, settings={"request_timeout": 0.4}) as server:
        long = {**LONG, "max_tokens": 8000}
        status, headers, answer = server.post("/v1/completions", long)
        assert (status, answer["error"]["code"], headers["x-should-retry"]) == (504, "request_timeout", "false")
        server.quiet()
        with OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            stream = client.completions.create(
                model=MODEL, prompt="x", max_tokens=8000, extra_body={"ignore_eos": True}, stream=True
            )
            with stream:
                assert next(stream).choices[0].text
                with pytest.raises(openai.APIError, match=r"took more than 0\.4 s"):
                    list(stream)
        server.quiet()


# -- failures --------------------------------------------------------------------------------------------
def test_a_step_that_fails_takes_only_its_requests(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(demo_gguf, max_model_len=1024) as server:
        assert server.service.model is not None
        engine = server.service.model.engine
        run, fail = engine.executor.run, threading.Event()

        def sometimes(step: Any) -> Any:
            if fail.is_set():
                fail.clear()
                raise RuntimeError("a planted fault")
            return run(step)

        monkeypatch.setattr(engine.executor, "run", sometimes)
        connection = raw_post(server.port, "/v1/completions", {**LONG, "stream": True})
        server.wait_for(lambda stats: stats.generated_tokens > 3)
        fail.set()
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(1 << 16)
        connection.close()
        assert b"server_error" in received
        assert b"planted" not in received
        server.quiet()
        assert server.post("/v1/completions", {**LONG, "max_tokens": 2})[0] == 200
        assert server.get("/health")[0] == 200


def test_an_engine_that_dies_is_told(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(demo_gguf, max_model_len=256) as server:
        assert server.service.model is not None
        engine = server.service.model.engine

        def broken(*_: object) -> None:
            raise AssertionError("a block is lost")

        monkeypatch.setattr(engine, "step", broken)
        monkeypatch.setattr(engine, "check_integrity", broken)
        assert server.error("/v1/completions", {"prompt": "x"})[0] == 500
        assert server.get("/health")[0] == server.get("/ready")[0] == 503
        assert server.error("/v1/completions", {"prompt": "x"})[0] == 500


def test_before_the_model_is_there() -> None:
    with serving(None) as server:
        assert server.get("/health")[0] == 200
        status, _, state = server.get("/ready")
        assert (status, state) == (503, {"status": "loading"})
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            status, headers, answer = server.post(path, body)
            assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "model_loading", "1")
        assert server.get("/v1/models")[0] == 503


# -- without HTTP ----------------------------------------------------------------------------------------
def test_the_service_answers_without_http(small: Server) -> None:
    answer = small.service.answer
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    status, body = small.call(lambda: answer("/v1/chat/completions", chat))
    assert (status, body["usage"]["completion_tokens"]) == (200, 3)
    assert small.call(lambda: answer("/tokenize", {"prompt": "x"}))[0] == 200
    assert small.call(lambda: answer("/v1/completions", {"prompt": 5}))[0] == 400
    assert (
        small.call(lambda: answer("/v1/completions", {"prompt": "x", "stream": True}))[1]["error"]["param"] == "stream"
    )
    assert small.call(lambda: answer("/v1/embeddings", {}))[0] == 404


# -- the process -----------------------------------------------------------------------------------------
@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`miaotui serve …` on a free port, ready."""
    command = [sys.executable, "-m", "miaotui.cli.main", "serve", *arguments, "--port", "0"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert started.stderr is not None
        first = started.stderr.readline()
        assert first.startswith("Listening on http://127.0.0.1:"), first + started.stderr.read()
        port = int(first.split(":")[2].split()[0])
        assert started.stderr.readline().startswith("Ready: ")
        yield started, port
    finally:
        started.kill()
        started.wait()
        assert started.stderr is not None
        started.stderr.close()


def first_bytes(connection: socket.socket) -> bytes:
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    return received


def rest(connection: socket.socket) -> bytes:
    received = b""
    while more := connection.recv(1 << 16):
        received += more
    connection.close()
    return received


def test_sigterm_drains(demo_gguf: Path) -> None:
    """What runs is finished, what is new is refused, and the process ends well."""
    with process(str(demo_gguf), "--served-model-name", MODEL) as (server, port):
        running = raw_post(port, "/v1/completions", {**LONG, "max_tokens": 400, "stream": True})
        received = first_bytes(running)
        server.send_signal(signal.SIGTERM)
        refused = b""
        while b" 503 " not in refused.split(b"\r\n")[0]:
            with raw_post(port, "/v1/completions", {"prompt": "x", "max_tokens": 1}) as late:
                refused = late.recv(4096)
                while not refused.endswith(b"}"):
                    refused += late.recv(4096)
        assert b"shutting_down" in refused
        received += rest(running)
        assert received.count(b'"finish_reason":"length"') == 1
        assert b"[DONE]" in received
        assert server.wait(20) == 0


def test_sigterm_ends_what_takes_too_long(demo_gguf: Path) -> None:
    with process(str(demo_gguf), "--shutdown-timeout", "0.3") as (server, port):
        running = raw_post(port, "/v1/completions", {**LONG, "max_tokens": 8000, "stream": True})
        received = first_bytes(running)
        server.send_signal(signal.SIGTERM)
        received += rest(running)
        assert b"shutting_down" in received
        assert server.wait(20) == 0


def test_a_second_sigterm_stops_at_once(demo_gguf: Path) -> None:
    with process(str(demo_gguf), "--shutdown-timeout", "600") as (server, port):
        running = raw_post(port, "/v1/completions", {**LONG, "max_tokens": 8000, "stream": True})
        first_bytes(running)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        running.close()


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF nothing")
    command = [sys.executable, "-m", "miaotui.cli.main", "serve", str(bad), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(demo_gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "miaotui.cli.main", "serve", str(demo_gguf)]
        command += ["--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    assert "--port" in done.stderr


def test_https(demo_gguf: Path, tmp_path: Path) -> None:
    import ssl
    from urllib.request import urlopen

    pair = [str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")]
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-out", pair[0], "-keyout", pair[1]], check=True, capture_output=True)
    command = [sys.executable, "-m", "miaotui.cli.main", "serve", str(demo_gguf), "--port", "0"]
    flags = ["--ssl-certfile", pair[0], "--ssl-keyfile", pair[1]]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        url = started.stderr.readline().split()[2]
        assert url.startswith("https://")
        with urlopen(f"{url}/health", context=ssl.create_default_context(cafile=pair[0]), timeout=30) as answer:
            assert answer.status == 200
        started.terminate()
        assert started.wait(20) == 0
    wrong = subprocess.run([*command, "--ssl-certfile", pair[1]], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False)
    alone = subprocess.run([*command, "--ssl-keyfile", pair[1]], capture_output=True, text=True, timeout=60)
    assert (alone.returncode, "--ssl-certfile" in alone.stderr) == (2, True)


def test_a_host_that_means_nothing() -> None:
    from miaotui.errors import UsageError
    from miaotui.serve.run import open_socket

    with pytest.raises(UsageError, match="not known"):
        open_socket("no.such.host.invalid", 0)
    six = open_socket("::1", 0)
    assert six.family == socket.AF_INET6
    six.close()


def test_the_worker_sleeps_without_work(small: Server) -> None:
    """An idle server's engine thread waits on its condition; it does not look again and again."""
    small.quiet()
    worker = small.service._worker
    assert worker is not None
    waits = []
    wait = worker._wake.wait

    def counted(timeout: float | None = None) -> bool:
        waits.append(timeout)
        return wait(timeout)

    worker._wake.wait = counted  # type: ignore[method-assign]
    small.call(lambda: small.service.look(lambda engine: None))
    asyncio.run(asyncio.sleep(0.3))
    worker._wake.wait = wait  # type: ignore[method-assign]
    assert waits == [None]


def test_a_body_that_is_too_long_is_told(server: Server) -> None:
    """Also to a client that writes all of it before it reads, whether or not it says how long it is."""
    for declared in (True, False):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            body = b"x" * (12 << 20)
            if declared:
                connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            else:
                connection.sendall(
                    head + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
                )
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
