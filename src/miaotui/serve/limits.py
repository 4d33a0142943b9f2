"""Bounds on what clients may take: seats in the queue, and bytes of a request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from types import TracebackType

from miaotui.serve.openai.errors import ApiError, overloaded, refused

BODY_TIMEOUT = 60.0
"""Seconds in which a request's body has to arrive."""
_LONGEST_RETRY = 60
_MOST_DISCARDED = 64 << 20
_DISCARD_TIMEOUT = 2.0
"""Bytes, and seconds, that a body which is too long is read on for."""


class Seats:
    """Counts the sequences of all requests from their arrival to the end of their answers.

    Used on the loop's thread alone. `running` is how many run at once; so many more may wait.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.most = running + waiting
        self.running = running
        self.taken = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._usual = 1.0
        """Seconds that a request takes, a moving average."""

    def take(self) -> Seat:
        """A seat for one sequence. Raises ApiError 429 when all are taken."""
        seat = Seat(self)
        seat.widen(1)
        return seat

    async def wait_empty(self) -> None:
        await self._empty.wait()

    def _add(self, count: int) -> None:
        if self.taken + count > self.most:
            raise overloaded(self.taken, self.retry_after)
        self.taken += count
        self._empty.clear()

    def _remove(self, count: int, seconds: float) -> None:
        self.taken -= count
        self._usual += 0.1 * (seconds - self._usual)
        if self.taken == 0:
            self._empty.set()

    @property
    def retry_after(self) -> int:
        """Seconds after which a seat may be free: what one takes, shared among those that run."""
        return min(max(1, math.ceil(self._usual / self.running)), _LONGEST_RETRY)


class Seat:
    """The seats of one request, given back at the end of the `with`."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._count = 0
        self._since = time.monotonic()

    def widen(self, count: int) -> None:
        """Have `count` seats where there was one. ApiError 429: they are taken; 400: there are not so many."""
        if count > self._seats.most:
            message = f"The request asks for {count} sequences, and at most {self._seats.most} are served at a time."
            raise refused(message, "n")
        self._seats._add(count - self._count)
        self._count = count

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._count:
            self._seats._remove(self._count, time.monotonic() - self._since)
            self._count = 0


async def read_body(chunks: AsyncIterator[bytes], declared: str | None, most: int) -> bytes:
    """A request's whole body. `declared` is its content-length header. Raises ApiError 413 past `most` bytes, 408."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            if declared is not None and declared.isdigit() and int(declared) > most:
                await discard(chunks)
                raise _too_large(most)
            async for chunk in chunks:
                body += chunk
                if len(body) > most:
                    await discard(chunks)
                    raise _too_large(most)
    except TimeoutError:
        raise ApiError(408, f"The request's body did not arrive within {BODY_TIMEOUT:g} s.") from None
    return bytes(body)


async def discard(chunks: AsyncIterator[bytes]) -> None:
    """Read on, within bounds: a client that still writes when its connection is closed never sees the answer."""
    left = _MOST_DISCARDED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_TIMEOUT):
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    return


def _too_large(most: int) -> ApiError:
    message = f"The request's body has more than {most} bytes. Shorten it, or raise --max-body-bytes."
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})
