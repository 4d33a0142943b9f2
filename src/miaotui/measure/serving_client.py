"""One streamed request to an OpenAI-compatible server, timed; and what such servers tell about themselves.

The generator often shares the machine with the server, so a request costs it little: bytes as they come, one clock
reading for each arrival, one JSON parse for each event.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from miaotui.errors import MiaotuiError, ResourceError, UsageError

TIMEOUT = aiohttp.ClientTimeout(total=6 * 3600, sock_connect=30)
"""As vLLM has it: a request may take hours, but a connection may not."""
_LOOKUP_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
_DETAIL = 300
"""Characters of a server's message that are kept."""


@dataclass(frozen=True)
class Failure:
    """Why a request failed. `cause` is short, and the same for failures of one kind; `detail` is of this one."""

    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times are in seconds; `started` is on the clock of `time.perf_counter`."""

    started: float
    first: float = 0.0
    """From sending the request to its first token."""
    gaps: list[float] = field(default_factory=list)
    """Between one arrival of tokens and the next."""
    latency: float = 0.0
    """From sending the request to its last token."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """The last two as the server's usage says; None when it says nothing."""
    text: str = ""
    queued: float = 0.0
    """Time that the request waited in the generator for others to end, before `started`."""
    failure: Failure | None = None

    @property
    def arrivals(self) -> int:
        """How often tokens came: as many as there were tokens where the server sends each by itself."""
        return len(self.gaps) + 1 if self.first else 0


class EventReader:
    """Server-sent events from bytes that are cut anywhere: the `data` of each, comments left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def close(self) -> list[bytes]:
        """What a stream leaves that ends without a line's end."""
        return self.feed(b"\n")


class _Stream:
    """Takes the events of one answer into an Outcome.

    A token has arrived when an event has a choice, whatever its text: some tokens have none of their own. As in vLLM's
    benchmark, but for a chat's opening event, which has a role and no token.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ended = False
        """Whether the server has said that this was all."""
        self._last = 0.0
        self._parts: list[str] = []

    def take(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self.ended = True
            return
        data = orjson.loads(event)
        if error := data.get("error"):
            raise StreamError(_message(error))
        if choices := data.get("choices"):
            self._take_choice(choices[0], now)
        if usage := data.get("usage"):
            self.outcome.prompt_tokens = usage.get("prompt_tokens")
            self.outcome.output_tokens = usage.get("completion_tokens")

    def _take_choice(self, choice: Mapping[str, Any], now: float) -> None:
        delta = choice.get("delta")
        if choice.get("finish_reason"):
            self.ended = True
        elif delta is not None and "role" in delta and not any(delta[name] for name in delta if name != "role"):
            return
        outcome = self.outcome
        if outcome.first:
            outcome.gaps.append(now - self._last)
        else:
            outcome.first = now - outcome.started
        self._last = now
        if text := choice.get("text") if delta is None else delta.get("content"):
            self._parts.append(text)

    def close(self) -> None:
        """All has arrived. Raises StreamError when that cannot be all."""
        self.outcome.text = "".join(self._parts)
        if not self.ended:
            raise StreamError("it stopped before it said that it was done", "stream cut short")
        if not self.outcome.first:
            raise StreamError("there was no token in it", "empty answer")
        self.outcome.latency = self._last - self.outcome.started


class StreamError(Exception):
    """A stream that is no whole answer."""

    def __init__(self, detail: str, cause: str = "error in the stream") -> None:
        super().__init__(detail)
        self.failure = Failure(cause, detail[:_DETAIL])


async def send(session: aiohttp.ClientSession, url: str, body: bytes) -> Outcome:
    """POST a streaming request and read its answer to the end. Never raises but for being cancelled."""
    outcome = Outcome(time.perf_counter())
    try:
        # aiohttp would write a long body in one piece that holds up the loop, and warns of it
        data = io.BytesIO(body) if len(body) > 1 << 20 else body
        async with session.post(url, data=data) as response:
            if response.status != 200:
                outcome.failure = Failure(f"HTTP {response.status}", _message_of(await response.read()))
            elif response.content_type == "application/json":
                outcome.failure = Failure("no stream", _message_of(await response.read()))
            else:
                await _read(response, outcome)
    except StreamError as error:
        outcome.failure = error.failure
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, AttributeError, TypeError) as error:
        outcome.failure = _failure(error)
    return outcome


async def _read(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    reader, stream, clock = EventReader(), _Stream(outcome), time.perf_counter
    async for data in response.content.iter_any():
        now = clock()
        for event in reader.feed(data):
            stream.take(event, now)
    for event in reader.close():
        stream.take(event, clock())
    stream.close()


def _failure(error: Exception) -> Failure:
    detail = str(error)[:_DETAIL]
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure("cannot connect", detail)
    if isinstance(error, TimeoutError):
        return Failure("timed out", detail)
    if isinstance(error, (ValueError, AttributeError, TypeError)) and not isinstance(error, aiohttp.ClientError):
        return Failure("not OpenAI's events", detail)
    return Failure("connection lost", detail or type(error).__name__)


def _message_of(raw: bytes) -> str:
    """The server's own words in the body of an error."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw.decode(errors="replace").strip()[:_DETAIL]
    return _message(data.get("error", data) if isinstance(data, dict) else data)


def _message(error: Any) -> str:
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:_DETAIL]


# -- what servers tell ---------------------------------------------------------------------------------------
def new_session(headers: Mapping[str, str], *, insecure: bool = False) -> aiohttp.ClientSession:
    """A session of as many connections as there are requests. Use it with `async with`."""
    connector = aiohttp.TCPConnector(limit=0, ssl=not insecure, keepalive_timeout=60)
    fixed = {"content-type": "application/json", "accept-encoding": "identity"}
    return aiohttp.ClientSession(connector=connector, timeout=TIMEOUT, headers={**fixed, **headers})


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The first model that the server lists. Raises MiaotuiError when it does not tell."""
    url = f"{base_url}/v1/models"
    try:
        async with session.get(url, timeout=_LOOKUP_TIMEOUT) as response:
            raw = await response.read()
            if response.status != 200:
                raise refusal(url, Failure(f"HTTP {response.status}", _message_of(raw)))
            return str(orjson.loads(raw)["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise refusal(url, _failure(error)) from error
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{url} does not list a model.", "Check --base-url, or give --model NAME.") from error


def refusal(url: str, failure: Failure) -> MiaotuiError:
    """The error to end with when the first thing asked of `url` has failed."""
    said = f"{url} answered {failure}".rstrip(".") + "."
    if failure.cause == "cannot connect":
        said = f"There is no server at {url}: {failure.detail}".rstrip(".") + "."
        return ResourceError(said, "Start it, or check --base-url.")
    if failure.cause in ("HTTP 401", "HTTP 403"):
        return UsageError(said, "Give a key that it knows: --api-key KEY, or OPENAI_API_KEY in the environment.")
    if failure.cause == "HTTP 404":
        return UsageError(said, "Check --base-url, --endpoint and --model.")
    if failure.cause.startswith("HTTP 4"):
        return UsageError(said, "Ask for what it serves: check the lengths, --ignore-eos and --extra-body.")
    return ResourceError(said, "Look at the server's log.")


class ServerTokenizer:
    """Counts with the server's own `/tokenize`, in vLLM's shape or llama.cpp's."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str) -> None:
        self._session = session
        self._url = f"{base_url}/tokenize"
        self._model = model
        self._llama_cpp = False
        self._few = asyncio.Semaphore(16)

    async def works(self) -> bool:
        """Whether the server has one; finds out its shape."""
        for self._llama_cpp in (False, True):
            if await self._ask("hello world") or 0:
                return True
        return False

    async def count(self, text: str) -> int:
        """Tokens of a prompt, those included that the model puts around it. Raises ResourceError."""
        count = await self._ask(text)
        if count is None:
            raise ResourceError(f"{self._url} no longer answers.", "Look at the server's log, or give --tokenizer.")
        return count

    async def _ask(self, text: str) -> int | None:
        body = {"content": text, "add_special": True} if self._llama_cpp else {"model": self._model, "prompt": text}
        try:
            async with (
                self._few,
                self._session.post(self._url, data=orjson.dumps(body), timeout=_LOOKUP_TIMEOUT) as response,
            ):
                raw = await response.read()
                return len(orjson.loads(raw)["tokens"]) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError):
            return None
