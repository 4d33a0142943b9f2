"""A server's process: the socket, signals, the model that loads meanwhile, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from miaotui.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from miaotui.engine.llm import LLM
    from miaotui.serve.service import Service

_BACKLOG = 2048
_KEEP_ALIVE = 75
"""Seconds for which an idle connection is kept: longer than clients do, so that they never write to a closed one."""
_LAST_WRITES = 5
"""Seconds that answers have to be read in, once they are finished and the server goes."""


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError when `host` means nothing here, ResourceError when `port` is taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UsageError(
            f"The host {host!r} is not known: {error.strerror}.", "Give an address of this machine."
        ) from None
    opened = socket.socket(family, kind)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        cause = f"The server cannot listen on {host}:{port}: {error.strerror}."
        raise ResourceError(cause, "Choose another --port, or end the program that has this one.") from None
    return opened


def in_background(load: Callable[[], LLM]) -> Future[LLM]:
    """Begin to load the model on a thread of its own. Python's end waits for it, as native code cannot be cut off."""
    future: Future[LLM] = Future()

    def run() -> None:
        try:
            future.set_result(load())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="miaotui-load").start()
    return future


def check_certificate(certfile: str, keyfile: str | None) -> None:
    """Raise UsageError when the server could not use them."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, _no_password)
    except OSError as error:
        cause = f"The certificate or its key cannot be used: {error}."
        raise UsageError(cause, "Give --ssl-certfile and --ssl-keyfile in PEM, the key without a password.") from None


def _no_password() -> str:
    """Nobody is there to be asked for one."""
    return ""


def run(
    service: Service,
    app: ASGIApp,
    listening: socket.socket,
    model: Future[LLM],
    *,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal. Raises what loading the model raised.

    SIGTERM or SIGINT: new requests are refused, running ones finish within the settings' time. A second one: at once.
    """
    import uvicorn
    import uvloop

    class Server(uvicorn.Server):
        """One whose signals are ours."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_WRITES,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(service, Server(config), listening, model, on_ready))
    if not model.done():
        sys.stderr.flush()
        os._exit(0)  # the thread that loads is in native code, and Python's own end would wait for it


async def _serve(
    service: Service, server: uvicorn.Server, listening: socket.socket, model: Future[LLM], on_ready: Callable[[], None]
) -> None:
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    async def drain() -> None:
        await service.drain(service.settings.shutdown_timeout)
        server.should_exit = True

    def on_signal() -> None:
        if draining:
            service.give_up()
            server.force_exit = server.should_exit = True
        else:
            draining.append(loop.create_task(drain()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    watching = loop.create_task(_watch(service, server, model, on_ready))
    try:
        await server.serve(sockets=[listening])
    finally:
        for task in draining:
            task.cancel()
        service.close()
    if watching.done():
        watching.result()
    watching.cancel()


async def _watch(service: Service, server: uvicorn.Server, model: Future[LLM], on_ready: Callable[[], None]) -> None:
    """Attach the model once it is there. A failure of it, or of the engine later, ends the server."""
    try:
        llm = await asyncio.wrap_future(model)
        if service.draining:
            llm.close()
            return
        service.attach(llm)
        on_ready()
        await service.failed.wait()
        raise ResourceError("The engine has failed.", "The log above says why; please report it.")
    except Exception:
        server.force_exit = server.should_exit = True
        raise
