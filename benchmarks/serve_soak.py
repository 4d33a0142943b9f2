"""A server under clients that misbehave: does it leak, stall, grow, or lose an answer?

    python -m benchmarks.serve_soak [--model demo] [--clients 64] [--minutes 5]

Each client does one of the things in `DEEDS` after another, for the whole time: it reads a streamed answer to its end,
goes away in the middle, sends a prompt that is far too long, sends what is no request at all, or reads very slowly. A
process of its own asks for /health ten times a second. Then the clients stop, the server has to come to rest, and its
engine is looked into. What is checked:

| check | |
|---|---|
| `answered` | every request that was accepted and not abandoned got its whole answer; every bad one its 4xx; no 5xx |
| `no_leak` | at rest nothing runs or waits, no block is in use, and `Engine.check_integrity` is content |
| `memory_flat` | the server's resident memory in the last tenth is within 5% of that after a fifth of the time |
| `health` | 99% of /health answers take less than 50 ms |
| `exit` | SIGTERM ends the server with status 0 |
| `quiet` | the server has not written a traceback: what clients do is no failure of its own |

Prints JSON; exits 1 when a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serve_process import Server, start, wait_ready

if TYPE_CHECKING:
    import aiohttp
    from starlette.requests import Request
    from starlette.responses import Response

    from miaotui.engine.engine import Engine

MODULE = "benchmarks.serve_soak"
LOOK = "/debug/engine"
"""A route that the server under test has and the product has not: the engine's figures, checked."""
MAX_MODEL_LEN = 1024
FLAT = 0.05
HEALTHY = 0.05
REST_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["serve"]:
        return serve(given)
    if given[:1] == ["probe"]:
        return probe(given[1], int(given[2]))
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given)
    report = soak(options)
    print(json.dumps(report, indent=2))
    return 0 if all(report["checks"].values()) else 1


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run it all; returns the report."""
    flags = [options.model, "--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", "256M"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server = start(flags, module=MODULE, log=log)
        try:
            wait_ready(server, log)
            with _Health(server) as health, _Memory(server) as memory:
                clients = Clients(server, options.seed)
                asyncio.run(clients.run(options.clients, options.minutes * 60))
            rest = _rest(server)
            server.process.terminate()
            status = server.process.wait(REST_SECONDS)
        finally:
            server.process.kill()
            server.process.wait()
        said = log.read_text(errors="replace").splitlines()
    return _report(options, clients, health.latencies, memory.samples, rest, status, said)


def _report(
    options: argparse.Namespace,
    clients: Clients,
    latencies: list[float],
    memory: list[int],
    rest: dict[str, Any],
    status: int,
    said: list[str],
) -> dict[str, Any]:
    tenth = max(1, len(memory) // 10)
    early = statistics.median(memory[2 * tenth : 3 * tenth] or memory)
    late = statistics.median(memory[-tenth:])
    p99 = statistics.quantiles(latencies, n=100)[98]
    trace = [round(sample / 1e6) for sample in memory[:: max(1, len(memory) // 30)]]
    checks = {
        "answered": not clients.wrong,
        "no_leak": rest["integrity"] == "sound" and not (rest["running"] or rest["waiting"] or rest["blocks_in_use"]),
        "memory_flat": abs(late / early - 1) <= FLAT,
        "health": p99 < HEALTHY,
        "exit": status == 0,
        "quiet": not any(line.startswith("Traceback") for line in said),
    }
    return {
        "clients": options.clients,
        "minutes": options.minutes,
        "checks": checks,
        "deeds": dict(sorted(clients.done.items())),
        "tokens_read": clients.tokens,
        "wrong": clients.wrong[:20],
        "wrong_count": len(clients.wrong),
        "memory_mb": {
            "after_warm_up": early / 1e6,
            "at_the_end": late / 1e6,
            "most": max(memory) / 1e6,
            "trace": trace,
        },
        "memory_growth": late / early - 1,
        "health_ms": {
            "median": statistics.median(latencies) * 1e3,
            "p99": p99 * 1e3,
            "max": max(latencies) * 1e3,
            "asked": len(latencies),
        },
        "at_rest": rest,
        "exit_status": status,
        "log": said[-30:] if not all(checks.values()) else [],
    }


# -- the clients -----------------------------------------------------------------------------------------------
class Clients:
    """`done` counts what was done, `wrong` has a line for each answer that was not as it has to be."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._seed = seed
        self._until = 0.0
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.tokens = 0

    async def run(self, count: int, seconds: float) -> None:
        import aiohttp

        self._until = time.perf_counter() + seconds
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, i) for i in range(count)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        source = random.Random(f"{self._seed} {number}")
        names, shares = list(DEEDS), [share for _, share in DEEDS.values()]
        while time.perf_counter() < self._until:
            (name,) = source.choices(names, shares)
            try:
                await DEEDS[name][0](self, session, source)
            except Exception as error:  # whatever it was, the server has not answered as it has to
                self.wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])
            self.done[name] += 1

    # -- what they do ------------------------------------------------------------------------------------------
    async def stream(self, session: aiohttp.ClientSession, source: random.Random) -> None:
        """Read a stream to its end."""
        path, body = _request(source)
        async with session.post(self._server.url + path, json=body) as response:
            self._check(await response.content.read(), response.status, body)

    async def whole(self, session: aiohttp.ClientSession, source: random.Random) -> None:
        """An answer in one piece."""
        path, body = _request(source)
        body = {name: value for name, value in body.items() if not name.startswith("stream")}
        async with session.post(self._server.url + path, json=body) as response:
            usage = (await response.json())["usage"]
            assert response.status == 200
            assert usage["completion_tokens"] == body["max_tokens"] * body.get("n", 1), usage
            self.tokens += usage["completion_tokens"]

    async def go_away(self, session: aiohttp.ClientSession, source: random.Random) -> None:
        """Close the connection after some events, or before the first."""
        path, body = _request(source)
        response = await session.post(self._server.url + path, json=body)
        assert response.status == 200, response.status
        for _ in range(source.randrange(8)):
            self.tokens += (await response.content.readany()).count(b"data: ")
        response.close()

    async def vanish(self, session: aiohttp.ClientSession, source: random.Random) -> None:
        """Send a request, or half of one, and be gone at once."""
        path, body = _request(source)
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        _, writer = await asyncio.open_connection(self._server.host, self._server.port)
        writer.write(head.encode() + data[: source.choice((len(data), len(data) // 2))])
        await writer.drain()
        await asyncio.sleep(source.uniform(0, 0.1))
        writer.transport.abort()

    async def read_slowly(self, session: aiohttp.ClientSession, source: random.Random) -> None:
        """A long stream of fat events, a little at a time."""
        import socket

        body = {"prompt": _words(source, 20), "max_tokens": 150, "logprobs": 20, "ignore_eos": True}
        data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        opened = socket.socket()
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.setblocking(False)
        await asyncio.get_running_loop().sock_connect(opened, (self._server.host, self._server.port))
        reader, writer = await asyncio.open_connection(sock=opened, limit=4096)
        try:
            writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
            answer = bytearray()
            while chunk := await reader.read(4096):
                answer += chunk
                await asyncio.sleep(source.uniform(0, 0.04))
            self._check(bytes(answer), int(answer[9:12]), body)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def ask_too_much(self, session: aiohttp.ClientSession, source: random.Random) -> None:
        """A prompt that is far too long."""
        words = source.choice((MAX_MODEL_LEN + 1, 10 * MAX_MODEL_LEN, 100 * MAX_MODEL_LEN))
        body = {"prompt": _words(source, words), "max_tokens": 5, "stream": source.random() < 0.5}
        await self._refused(session, json.dumps(body).encode(), {400})

    async def talk_nonsense(self, session: aiohttp.ClientSession, source: random.Random) -> None:
        """No JSON, wrong JSON, or far too much of it."""
        data, statuses = source.choice(NONSENSE)
        await self._refused(session, data, statuses)

    async def _refused(self, session: aiohttp.ClientSession, data: bytes, statuses: set[int]) -> None:
        import aiohttp

        headers, url = {"content-type": "application/json"}, f"{self._server.url}/v1/completions"
        try:
            async with session.post(url, data=io.BytesIO(data), headers=headers) as response:
                answer = await response.json(content_type=None)
        except aiohttp.ClientConnectionError:
            assert CUT in statuses
            self.done["cut off while sending too much"] += 1
            return
        assert response.status in statuses, (response.status, answer)
        assert answer["error"]["message"]

    def _check(self, answer: bytes, status: int, body: dict[str, Any]) -> None:
        """A stream has to be whole."""
        assert status == 200, answer[:300]
        events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]", answer[-300:]
        usage = json.loads(events[-2])["usage"]
        assert usage["completion_tokens"] == body["max_tokens"] * body.get("n", 1), usage
        self.tokens += usage["completion_tokens"]


Deed = Callable[[Clients, "aiohttp.ClientSession", random.Random], Awaitable[None]]
DEEDS: dict[str, tuple[Deed, float]] = {
    "stream": (Clients.stream, 0.42),
    "whole": (Clients.whole, 0.08),
    "go_away": (Clients.go_away, 0.2),
    "vanish": (Clients.vanish, 0.06),
    "read_slowly": (Clients.read_slowly, 0.06),
    "ask_too_much": (Clients.ask_too_much, 0.08),
    "talk_nonsense": (Clients.talk_nonsense, 0.1),
}
"""What clients do, and how often."""
CUT = 0
"""In place of a status: the server closes the connection while it is still written to, so that the answer is lost."""
NONSENSE: list[tuple[bytes, set[int]]] = [
    (b"{", {400}),
    (b"", {400}),
    (b"\xff\x00\xfe", {400}),
    (b"[1, 2]", {400}),
    (b'{"prompt": 5}', {400}),
    (b'{"prompt": "hi", "max_tokens": -1}', {400}),
    (b'{"prompt": "hi", "nonsense": true}', {400}),
    (b'{"prompt": [1, 99999999]}', {400}),
    (b'{"prompt": "hi", "model": "another"}', {404}),
    (b'{"prompt": "' + b"[" * 100_000 + b'"', {400}),
    (b"[" * 100_000, {400}),
    (b'{"prompt": "' + b"x" * (9 << 20) + b'"}', {413, CUT}),
]
"""Bodies, and how they are to be refused."""


def _request(source: random.Random) -> tuple[str, dict[str, Any]]:
    """A sound streaming request, and where it goes."""
    text = _words(source, source.randint(1, 200))
    body: dict[str, Any] = {"max_tokens": source.randint(1, 96), "ignore_eos": True}
    body |= {"temperature": source.choice((0, 1)), "stream": True, "stream_options": {"include_usage": True}}
    if source.random() < 0.1:
        body["n"] = 2
    if source.random() < 0.1:
        body["priority"] = source.randint(-1, 1)
    if source.random() < 0.5:
        return "/v1/completions", body | {"prompt": text}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


def _words(source: random.Random, count: int) -> str:
    from miaotui.measure.serving_data import WORDS

    return " ".join(source.choices(WORDS, k=count))


# -- what is watched -------------------------------------------------------------------------------------------
class _Health:
    """Asks for /health from a process of its own; afterwards `latencies` has the seconds of each answer."""

    def __init__(self, server: Server) -> None:
        self._command = [sys.executable, "-m", MODULE, "probe", server.host, str(server.port)]
        self.latencies: list[float] = []

    def __enter__(self) -> _Health:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        answer, _errors = self._process.communicate("")
        self.latencies = json.loads(answer)


def probe(host: str, port: int) -> int:
    """Ask until stdin is closed; one that is not answered with 200 counts as a minute."""
    import http.client

    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    latencies = []
    while not over.wait(0.1):
        connection = http.client.HTTPConnection(host, port, timeout=60)
        began, status = time.perf_counter(), 0
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            status = connection.getresponse().status
        latencies.append(time.perf_counter() - began if status == 200 else 60.0)
    print(json.dumps(latencies))
    return 0


class _Memory:
    """Resident bytes of the server, twice a second, in `samples`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._record)
        self.samples: list[int] = []

    def _record(self) -> None:
        while not self._over.wait(0.5):
            with contextlib.suppress(OSError):
                self.samples.append(self._server.rss())

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _rest(server: Server) -> dict[str, Any]:
    """The engine's figures when the server has come to rest, or after `REST_SECONDS`."""
    until = time.perf_counter() + REST_SECONDS
    while True:
        status, raw = server.get(LOOK)
        assert status == 200, raw
        found: dict[str, Any] = json.loads(raw)
        if not (found["running"] or found["waiting"]) or time.perf_counter() > until:
            return found
        time.sleep(0.2)


# -- the server ------------------------------------------------------------------------------------------------
def serve(arguments: list[str]) -> int:
    """`miaotui serve`, all of it, with the route LOOK besides."""
    from miaotui.cli.main import main as miaotui
    from miaotui.serve import app as module

    create = module.create_app

    def create_app(service: Any, *rest: Any, **named: Any) -> Any:
        from starlette.responses import JSONResponse

        made = create(service, *rest, **named)
        found: dict[str, Any] = {}

        async def look(_: Request) -> Response:
            await service.look(lambda engine: found.update(figures(engine)))
            return JSONResponse(found)

        made.add_route(LOOK, look)
        return made

    module.create_app = create_app
    return miaotui(arguments)


def figures(engine: Engine) -> dict[str, Any]:
    """What the engine holds, and whether that is sound."""
    try:
        engine.check_integrity()
        integrity = "sound"
    except AssertionError as error:
        integrity = str(error) or "unsound"
    stats = engine.stats
    return {
        "integrity": integrity,
        "running": stats.running,
        "waiting": stats.waiting,
        "blocks": stats.blocks,
        "blocks_in_use": stats.blocks_in_use,
        "preemptions": stats.preemptions,
        "prefix_hits": stats.prefix_hits,
        "steps": stats.steps,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "finished": {str(reason): count for reason, count in stats.finished.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
