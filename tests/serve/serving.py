"""A real server for tests: the demo model on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import uvicorn
import uvloop

from miaotui import LLM
from miaotui.serve.app import create_app
from miaotui.serve.run import open_socket
from miaotui.serve.service import Service
from miaotui.serve.settings import ServeSettings

MODEL = "tested"


class Server:
    """A server that runs. `call` does something on its event loop."""

    def __init__(self, service: Service, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._loop = loop

    def call(self, make: Callable[[], Any]) -> Any:
        """The result of the coroutine that `make` gives."""

        async def run() -> Any:
            return await make()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)

    def quiet(self) -> None:
        """Wait until nothing is in flight; then no block may be held and everything must agree."""
        assert self.service._seats is not None
        self.call(lambda: asyncio.wait_for(self.service._seats.wait_empty(), 30))  # type: ignore[union-attr]

        def check(engine: Any) -> None:
            engine.check_integrity()
            assert not engine.has_work
            assert engine.stats.blocks_in_use == 0

        self.call(lambda: self.service.look(check))

    def wait_for(self, holds: Callable[[Any], bool]) -> None:
        """Wait until the engine's stats are so."""
        assert self.service.model is not None
        end = time.monotonic() + 30
        while not holds(self.service.model.engine.stats):
            assert time.monotonic() < end, "it never came"
            time.sleep(0.005)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of a POST; `body` is bytes, or sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask(Request(self.url + path, data, {"content-type": "application/json", **headers}))

    def get(self, path: str) -> tuple[int, dict[str, str], Any]:
        return self.ask(Request(self.url + path))

    def ask(self, request: Request) -> tuple[int, dict[str, str], Any]:
        try:
            with urlopen(request, timeout=60) as answer:
                status, headers, content = answer.status, dict(answer.headers), answer.read()
        except HTTPError as error:
            with error:
                status, headers, content = error.code, dict(error.headers), error.read()
        return status, {k.lower(): v for k, v in headers.items()}, json.loads(content)

    def error(self, path: str, body: Any) -> tuple[int, str | None, str | None]:
        """Status, parameter and code of an answer that has to be an error in OpenAI's shape."""
        status, _, answer = self.post(path, body)
        assert set(answer) == {"error"}, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["message"]
        return status, answer["error"]["param"], answer["error"]["code"]


@contextmanager
def serving(
    model: Path | None,
    *,
    make_app: Callable[[Service, ServeSettings], Any] = create_app,
    settings: dict[str, Any] | None = None,
    **engine: Any,
) -> Iterator[Server]:
    """A server of `model`; None never gets one. `settings` of the server, the rest of `LLM`."""
    started: list[Server] = []
    ready = threading.Event()
    told = ServeSettings(served_model_names=(MODEL, "alias"), **(settings or {}))
    listening = open_socket("127.0.0.1", 0)
    port = listening.getsockname()[1]

    async def main() -> None:
        service = Service(told)
        app = make_app(service, told)
        if model is not None:
            service.attach(LLM(str(model), **engine))
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        started.append(Server(service, port, asyncio.get_running_loop()))
        ready.set()
        await asyncio.to_thread(stop.wait)
        service.give_up()
        server.should_exit = True
        await serving
        service.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(main())
            finally:
                ready.set()

    stop = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60)
        assert started, "the server did not start"
        yield started[0]
    finally:
        stop.set()
        thread.join(30)
        listening.close()


def raw_post(port: int, path: str, body: dict[str, Any], **headers: str) -> socket.socket:
    """A connection on which a request has been sent, and nothing read."""
    data = json.dumps(body).encode()
    told = {"host": "x", "content-type": "application/json", "content-length": str(len(data)), **headers}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in told.items()) + "\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(head.encode() + data)
    return connection
