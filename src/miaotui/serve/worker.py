"""The engine on a thread of its own, and the way between it and an event loop.

The loop puts orders into the inbox; the thread takes them between two steps, and hands over all outputs of a step in
ONE wake-up of the loop. Without work the thread waits on a condition and costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from miaotui.engine.engine import Engine
from miaotui.engine.grammar import GrammarMask
from miaotui.engine.params import SamplingParams
from miaotui.engine.request import RequestOutput
from miaotui.engine.stats import EngineStats
from miaotui.errors import MiaotuiError, ResourceError

_log = logging.getLogger(__name__)

Observe = Callable[[EngineStats, list[RequestOutput]], None]
"""Called on the loop after each step with the engine's state and what the step gave, cancelled requests included."""


@dataclass(frozen=True, slots=True)
class Order:
    """One prompt for the engine; `grammar` as `Engine.check` made it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    stream: bool
    grammar: GrammarMask | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    """What the request's latencies count from: not when the engine had finished its step and took it."""


Item = RequestOutput | Exception


class Mailbox:
    """What arrives for one HTTP request, in order. Used on the loop's thread alone; one task takes."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[Item]:
        """All that has arrived since the last time, at least one item."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._items = self._items, []
        return taken


@dataclass(slots=True)
class _Inbox:
    orders: list[Order] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    looks: list[Callable[[Engine], None]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.orders or self.cancelled or self.looks)


class EngineWorker:
    """Owns `engine` from `start` to `stop`: nobody else may step it in between.

    `submit`, `cancel` and `stop` are for the loop's thread. `on_death` is called there when the engine cannot go on.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        *,
        observe: Observe | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self._loop = loop
        self._observe = observe
        self._on_death = on_death
        self._mailboxes: dict[str, Mailbox] = {}
        """By request id; touched by the loop's thread alone. An output without one is dropped."""
        self._inbox = _Inbox()
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="miaotui-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- the loop's side ---------------------------------------------------------------------------------
    def submit(self, orders: Sequence[Order], mailbox: Mailbox) -> None:
        """Have the engine take the orders before its next step; their outputs, or an exception, go to `mailbox`."""
        if self._stopping or not self._thread.is_alive():
            mailbox.put(ResourceError("The engine has stopped.", "Start the server again."))
            return
        for order in orders:
            self._mailboxes[order.request_id] = mailbox
        with self._wake:
            self._inbox.orders += orders
            self._wake.notify()

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Forget those of the requests that are not finished, before the next step. Nothing more arrives for them."""
        going = [request_id for request_id in request_ids if self._mailboxes.pop(request_id, None) is not None]
        if going:
            with self._wake:
                self._inbox.cancelled += going
                self._wake.notify()

    async def look(self, what: Callable[[Engine], None]) -> None:
        """Call `what` on the engine's thread between two steps; returns when it is done, raises what it raises."""
        done: asyncio.Future[None] = self._loop.create_future()

        def look(engine: Engine) -> None:
            error: Exception | None = None
            try:
                what(engine)
            except Exception as raised:
                error = raised
            self._loop.call_soon_threadsafe(_settle, done, error)

        with self._wake:
            self._inbox.looks.append(look)
            self._wake.notify()
        await done

    def stop(self) -> None:
        """End the thread after the step it is in; requests still in flight are cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # -- the engine's thread -----------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while (inbox := self._next_inbox()) is not None:
                outputs = self._take_in(inbox)
                if self.engine.has_work:
                    outputs += self._step()
                if outputs or self._observe is not None:
                    self._hand_over(outputs)
            self.engine.cancel_all()
        except BaseException:
            _log.exception("The engine has failed and cannot go on.")
            self._tell_loop(self._die)

    def _next_inbox(self) -> _Inbox | None:
        """What has been ordered since the last step; None when it is time to end. Sleeps while there is no work."""
        with self._wake:
            while not (self._inbox or self._stopping or self.engine.has_work):
                self._wake.wait()
            if self._stopping:
                return None
            inbox, self._inbox = self._inbox, _Inbox()
            return inbox

    def _take_in(self, inbox: _Inbox) -> list[tuple[str, Item]]:
        outputs: list[tuple[str, Item]] = []
        for order in inbox.orders:
            try:
                self.engine.add_request(
                    order.prompt_token_ids,
                    order.params,
                    request_id=order.request_id,
                    priority=order.priority,
                    stream=order.stream,
                    grammar=order.grammar,
                    arrival_time=order.arrival_time,
                )
            except MiaotuiError as error:
                outputs.append((order.request_id, error))
        for request_id in inbox.cancelled:
            ended = self.engine.cancel(request_id)
            if ended is not None:
                outputs.append((request_id, ended))
        for look in inbox.looks:
            look(self.engine)
        return outputs

    def _step(self) -> list[tuple[str, Item]]:
        """One step. Should it fail, all that is in flight fails with it, and the engine goes on with what is sound."""
        try:
            return [(output.request_id, output) for output in self.engine.step()]
        except Exception as error:
            _log.exception("A step failed; the requests in it are given up.")
            given_up = self.engine.cancel_all()
            self.engine.check_integrity()
            return [(output.request_id, error) for output in given_up]

    def _hand_over(self, outputs: list[tuple[str, Item]]) -> None:
        stats = self.engine.stats if self._observe is not None else None
        self._tell_loop(self._deliver, outputs, stats)

    def _tell_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            with self._wake:
                self._stopping = True  # the loop is closed: nobody is there to be told

    # -- on the loop again -------------------------------------------------------------------------------
    def _deliver(self, outputs: list[tuple[str, Item]], stats: EngineStats | None) -> None:
        mailboxes = self._mailboxes
        for request_id, item in outputs:
            mailbox = mailboxes.get(request_id)
            if mailbox is not None:
                if isinstance(item, Exception) or item.finished:
                    del mailboxes[request_id]
                mailbox.put(item)
        if self._observe is not None and stats is not None:
            self._observe(stats, [item for _, item in outputs if isinstance(item, RequestOutput)])

    def _die(self) -> None:
        lost, self._mailboxes = self._mailboxes, {}
        for mailbox in set(lost.values()):
            mailbox.put(ResourceError("The engine has failed.", "Look at the server's log, and start it again."))
        self._on_death()


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
