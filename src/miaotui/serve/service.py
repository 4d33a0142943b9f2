"""OpenAI's endpoints without HTTP: bodies in; JSON, or a stream of events, out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from miaotui.engine.engine import Engine
from miaotui.serve.limits import Seat, Seats
from miaotui.serve.openai import chat, completions, responses, tokenize
from miaotui.serve.openai.errors import ApiError, as_api_error, engine_failed, loading, refused, shutting_down
from miaotui.serve.openai.job import Job, Model, now
from miaotui.serve.running import Running, orders_of
from miaotui.serve.settings import ServeSettings
from miaotui.serve.worker import EngineWorker, Observe, Order

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM

T = TypeVar("T")
Prepare = Callable[[Model, Mapping[str, Any]], Job]

JOBS: dict[str, Prepare] = {
    "/v1/chat/completions": chat.prepare,
    "/v1/completions": completions.prepare,
    "/v1/responses": responses.prepare,
}
"""Endpoints that the engine answers, by path."""
LOOKUPS: dict[str, Callable[[Model, Mapping[str, Any]], dict[str, Any]]] = {
    "/tokenize": tokenize.tokenize,
    "/detokenize": tokenize.detokenize,
}
"""Endpoints that need the tokenizer alone."""

_PREPARERS = 2
"""Threads that read bodies, render templates and tokenise, so that the event loop need not."""


class Service:
    """One model's endpoints. Made before the model is there; `attach` it on the event loop that all calls come from.

    Every request takes seats, is prepared in a thread, and runs on the engine's. At the end `close` it.
    """

    def __init__(self, settings: ServeSettings, *, observe: Observe | None = None) -> None:
        self.settings = settings
        self.draining = False
        self.failed = asyncio.Event()
        """Set when the engine has died, and the process should too."""
        self.model: Model | None = None
        self._observe = observe
        self._created = now()
        self._llm: LLM | None = None
        self._worker: EngineWorker | None = None
        self._seats: Seats | None = None
        self._running: set[Running] = set()
        self._threads = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="miaotui-prepare")

    def attach(self, llm: LLM) -> None:
        """Begin to serve a loaded model, which belongs to the service from now on."""
        config = llm.engine.config
        self.model = Model(
            self.settings.served_model_names,
            llm.engine,
            llm.tokenizer,
            llm.chat_template,
            self.settings.tool_call_parser,
        )
        self._llm = llm
        self._seats = Seats(config.max_num_seqs, self.settings.max_queue)
        self._worker = EngineWorker(
            llm.engine, asyncio.get_running_loop(), observe=self._observe, on_death=self.failed.set
        )
        self._worker.start()

    @property
    def artefact(self) -> Path | None:
        """The model's folder or file, beside which its card may lie; None before it is loaded."""
        return None if self._llm is None else self._llm.path

    @property
    def state(self) -> str:
        """`ready` when requests are taken, or why they are not."""
        if self.failed.is_set():
            return "failed"
        if self.draining:
            return "draining"
        if self._seats is None:
            return "loading"
        return "queue full" if self._seats.taken >= self._seats.most else "ready"

    # -- requests ------------------------------------------------------------------------------------------
    async def answer(self, url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of a request that does not stream. Never raises but for being cancelled.

        It has no deadline: nobody waits for it, and in a batch it may have to let many others go first.
        503: not yet, or not any more.
        """
        try:
            if url in LOOKUPS:
                return 200, await self.look_up(url, lambda: body)
            if body.get("stream"):
                raise refused("A stream cannot be given here. Leave stream out.", "stream")
            with self.admit() as seat, await self.begin(url, lambda: body, seat, timeout=None) as running:
                return 200, await self.whole(running)
        except Exception as error:
            found = engine_failed() if self.failed.is_set() else as_api_error(error)
            return found.status, found.body()

    async def look_up(self, url: str, read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Answer from the tokenizer alone. `read` gives the body; it is called in a thread."""
        with self.admit():
            model = self.attached
            return await self._in_thread(lambda: LOOKUPS[url](model, read()))

    def admit(self) -> Seat:
        """A seat for a request that has arrived, for the whole of its life.

        Raises ApiError: 503 before the model is there and while the server shuts down, 429 when the queue is full.
        """
        if self.draining:
            raise shutting_down()
        if self._seats is None:
            raise loading()
        return self._seats.take()

    async def begin(
        self, url: str, read: Callable[[], Mapping[str, Any]], seat: Seat, *, timeout: float | None
    ) -> Running:
        """Understand a request and give it to the engine, which has `timeout` seconds for it.

        `read` gives its body; it is called in a thread.

        Raises ApiError and RequestError for what cannot be served.
        """
        model = self.attached
        prepare = JOBS.get(url)
        if prepare is None:
            raise ApiError(404, f"There is no endpoint {url}.", param="url")

        def understand() -> tuple[Job, list[Order]]:
            job = prepare(model, read())
            return job, orders_of(model, job)

        job, orders = await self._in_thread(understand)
        seat.widen(sum(order.params.n for order in orders))
        if self.draining:
            raise shutting_down()
        assert self._worker is not None
        return Running(job, orders, self._worker, timeout, self._running)

    async def whole(self, running: Running) -> dict[str, Any]:
        """The answer of a request that does not stream. Raises what it ended with."""
        return await running.whole(self._in_thread)

    async def look(self, what: Callable[[Engine], None]) -> None:
        """Call `what` with the engine between two steps."""
        assert self._worker is not None
        await self._worker.look(what)

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists."""
        model = self.attached
        length = model.engine.config.max_model_len
        return [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "miaotui",
                "root": model.names[0],
                "parent": None,
                "max_model_len": length,
            }
            for name in model.names
        ]

    # -- its end -------------------------------------------------------------------------------------------
    async def drain(self, timeout: float) -> None:
        """Take no more requests; give those that run `timeout` seconds, then end them."""
        self.draining = True
        if self._seats is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await self._seats.wait_empty()
        except TimeoutError:
            self.give_up()

    def give_up(self) -> None:
        """End every request now, with an error."""
        self.draining = True
        for running in list(self._running):
            running.fail(shutting_down())

    def close(self) -> None:
        """Stop the engine after the step it is in, and free the model."""
        self.give_up()
        self._threads.shutdown(cancel_futures=True)
        if self._worker is not None:
            self._worker.stop()
        if self._llm is not None:
            self._llm.close()

    @property
    def attached(self) -> Model:
        """The model. Raises ApiError 503 before it is there."""
        if self.model is None:
            raise loading()
        return self.model

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do what may take long where it does not hold up the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
