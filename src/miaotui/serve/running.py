"""A request while the engine works on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

from miaotui.engine.request import RequestOutput
from miaotui.errors import RequestError
from miaotui.serve.openai.errors import as_api_error, timed_out
from miaotui.serve.openai.job import Job, Model, new_id
from miaotui.serve.openai.sampling import renamed
from miaotui.serve.worker import EngineWorker, Mailbox, Order

InThread = Callable[[Callable[[], dict[str, Any]]], Awaitable[dict[str, Any]]]


class Abandoned(Exception):
    """The client has gone: nobody wants the answer."""


def orders_of(model: Model, job: Job) -> list[Order]:
    """What the engine is to run for a job. Raises RequestError for what it could never serve."""
    most = model.engine.config.max_num_seqs
    if job.params.n > most:
        cause = f"n is {job.params.n}, and at most {most} sequences run together."
        raise RequestError(cause, "Ask for fewer, or raise --max-num-seqs.", param="n")
    name = new_id("run")
    with renamed(job.aliases):
        return [
            Order(f"{name}-{i}", ids, job.params, job.priority, job.stream, model.engine.check(ids, job.params))
            for i, ids in enumerate(job.prompts)
        ]


class Running:
    """One job in the engine. Leaving the `with` cancels what is not finished."""

    def __init__(
        self, job: Job, orders: Sequence[Order], worker: EngineWorker, timeout: float | None, everyone: set[Running]
    ) -> None:
        """Hand the orders over. `everyone` lists all that run; this one is in it until its end."""
        self.job = job
        self.tokens = {"prompt_tokens": sum(len(order.prompt_token_ids) for order in orders), "completion_tokens": 0}
        """For the access log."""
        self._places = {order.request_id: i for i, order in enumerate(orders)}
        self._worker = worker
        self._mailbox = Mailbox()
        self._everyone = everyone
        self._alarm: asyncio.TimerHandle | None = None
        if timeout is not None:
            self._alarm = asyncio.get_running_loop().call_later(timeout, lambda: self.fail(timed_out(timeout)))
        everyone.add(self)
        worker.submit(orders, self._mailbox)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._everyone.discard(self)
        self._worker.cancel(list(self._places))

    def fail(self, error: Exception) -> None:
        """End with `error`: the engine is told to stop, and whoever waits gets the error."""
        self._worker.cancel(list(self._places))
        self._mailbox.put(error)

    def abandon(self) -> None:
        """The client has gone."""
        self.fail(Abandoned())

    def _count(self, output: RequestOutput) -> None:
        for choice in output.outputs:
            self.tokens["completion_tokens"] += len(choice.token_ids)

    async def whole(self, in_thread: InThread) -> dict[str, Any]:
        """The whole answer, once all prompts are finished. Raises what they ended with."""
        outputs: dict[int, RequestOutput] = {}
        while len(outputs) < len(self._places):
            for item in await self._mailbox.take():
                if isinstance(item, Exception):
                    raise item
                outputs[self._places[item.request_id]] = item
                self._count(item)
        ordered = [outputs[i] for i in range(len(outputs))]
        if self.job.params.logprobs is None:
            return self.job.answer(ordered)
        return await in_thread(lambda: self.job.answer(ordered))

    async def events(self) -> AsyncIterator[bytes]:
        """The stream's events, all that a step has brought at once. An error in the middle is an event too."""
        left = len(self._places)
        chunks, places = self.job.chunks, self._places
        try:
            while left:
                wire = b""
                for item in await self._mailbox.take():
                    if isinstance(item, Exception):
                        raise item
                    wire += chunks(places[item.request_id], item)
                    self._count(item)
                    left -= item.finished
                if left and wire:
                    yield wire
            yield wire + self.job.closing()
        except Abandoned:
            return
        except Exception as error:
            yield self.job.failure(as_api_error(error))
