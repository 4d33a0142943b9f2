"""`miaotui bench serve`: load on an OpenAI-compatible server, with the options and figures of vLLM's `bench serve`.

Requests arrive by a gamma process, are streamed, and are timed where they arrive. Tokens are counted by the server's
usage. All of it runs on one event loop in one thread.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import aiohttp
import orjson
import uvloop

from miaotui.errors import UsageError
from miaotui.measure.serving_client import Outcome, ServerTokenizer, first_model, new_session, refusal, send
from miaotui.measure.serving_data import Counter, Dataset, LocalTokenizer, Sample, samples
from miaotui.measure.serving_report import GOALS, METRICS, report

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
"""What each backend asks unless told otherwise."""
DEFAULT_METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """What to ask, how, and how often. Raises UsageError for what cannot mean anything. Names are vLLM's options."""

    base_url: str = "http://127.0.0.1:8000"
    backend: Literal["openai", "openai-chat"] = "openai"
    endpoint: str | None = None
    model: str | None = None
    """None takes the first that the server lists."""
    tokenizer: str | None = None
    """None counts with the server's /tokenize, where it has one."""
    dataset: Dataset = field(default_factory=Dataset)
    num_prompts: int = 1000
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    percentile_metrics: Sequence[str] = DEFAULT_METRICS
    metric_percentiles: Sequence[float] = (99.0,)
    ignore_eos: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    insecure: bool = False
    num_warmups: int = 0
    ready_check_timeout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.percentile_metrics:
            _choose("--percentile-metrics", name, METRICS)
        for name in self.goodput:
            _choose("--goodput", name, GOALS)
        if not all(0 <= percentile <= 100 for percentile in self.metric_percentiles):
            raise UsageError("A percentile is not between 0 and 100.", "Check --metric-percentiles.")
        if not (self.request_rate > 0 and self.burstiness > 0):
            raise UsageError("--request-rate and --burstiness are above 0.", "Leave them out to send all at once.")
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"{self.base_url!r} is no URL.", "Give one such as http://127.0.0.1:8000.")

    @property
    def root(self) -> str:
        """The base URL without the `/v1` that OpenAI's clients have at its end, since endpoints begin with it."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def url(self) -> str:
        return self.root + (self.endpoint or ENDPOINTS[self.backend])


def _choose(option: str, name: str, names: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in names:
        raise UsageError(f"{option} does not know {name!r}.", f"Choose from {', '.join(names)}.")


def run(settings: ServingSettings, tell: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Measure; returns the report. `tell` is called with the requests that are answered and all of them.

    Raises UsageError and ResourceError when the first request, a trial outside the measurement, fails.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(settings, tell))


async def measure(settings: ServingSettings, tell: Callable[[int, int], None]) -> dict[str, Any]:
    """`run`, on a loop that runs already."""
    async with new_session(settings.headers, insecure=settings.insecure) as session:
        await _wait(session, settings)
        model = settings.model or await first_model(session, settings.root)
        counter, notes = await _counter(session, settings, model)
        chat = settings.backend == "openai-chat"
        *asked, trial = await samples(settings.dataset, settings.num_prompts + 1, settings.seed, counter, chat=chat)
        bodies = [body(sample, settings, model) for sample in asked]
        await _try(session, settings, body(trial, settings, model))
        started, cpu = time.perf_counter(), time.process_time()
        outcomes = await _load(session, settings, bodies, tell)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    notes += _complete(asked, outcomes, counter)
    return {
        **_about(settings, model),
        **report(
            outcomes,
            seconds,
            metrics=settings.percentile_metrics,
            percentiles=settings.metric_percentiles,
            goodput=settings.goodput,
        ),
        "client_cpu_seconds": cpu,
        "notes": notes,
    }


def body(sample: Sample, settings: ServingSettings, model: str) -> bytes:
    """A request's body. `max_tokens` in chats too: every compatible server knows it, unlike its successor."""
    chat = settings.backend == "openai-chat"
    fields: dict[str, Any] = {"model": model}
    if chat:
        messages = sample.prompt if isinstance(sample.prompt, list) else [{"role": "user", "content": sample.prompt}]
        fields["messages"] = messages
    else:
        fields["prompt"] = sample.prompt
    fields |= {"max_tokens": sample.output_tokens, "stream": True, "stream_options": {"include_usage": True}}
    if settings.ignore_eos:
        fields["ignore_eos"] = True
    return orjson.dumps(fields | dict(settings.extra_body))


# -- before the measurement --------------------------------------------------------------------------------
async def _wait(session: aiohttp.ClientSession, settings: ServingSettings) -> None:
    """Wait for a server that still starts, as long as the settings allow; what is wrong then shows with the trial."""
    until = time.perf_counter() + settings.ready_check_timeout
    while time.perf_counter() < until:
        try:
            async with session.get(f"{settings.root}/v1/models", timeout=aiohttp.ClientTimeout(total=5)) as response:
                if response.status < 500:
                    return
        except (aiohttp.ClientError, TimeoutError, OSError):
            pass
        await asyncio.sleep(0.5)


async def _counter(
    session: aiohttp.ClientSession, settings: ServingSettings, model: str
) -> tuple[Counter | None, list[str]]:
    """What counts tokens, and what is to be said about it."""
    if settings.tokenizer is not None:
        return LocalTokenizer(settings.tokenizer), []
    if settings.dataset.name == "custom":
        return None, []
    server = ServerTokenizer(session, settings.root, model)
    if await server.works():
        return server, []
    return None, ["The server has no /tokenize and there is no --tokenizer: lengths of prompts are in words."]


async def _try(session: aiohttp.ClientSession, settings: ServingSettings, trial: bytes) -> None:
    """One request that has to succeed, and the warm-ups."""
    outcome = await send(session, settings.url, trial)
    if outcome.failure is not None:
        raise refusal(settings.url, outcome.failure)
    await _load(session, settings, [trial] * settings.num_warmups, lambda done, total: None, paced=False)


# -- the measurement ---------------------------------------------------------------------------------------
async def _load(
    session: aiohttp.ClientSession,
    settings: ServingSettings,
    bodies: Sequence[bytes],
    tell: Callable[[int, int], None],
    *,
    paced: bool = True,
) -> list[Outcome]:
    """Send all, each at its time, and read them to their ends. In the order of `bodies`."""
    seats = asyncio.Semaphore(settings.max_concurrency) if settings.max_concurrency else nullcontext()
    rate = settings.request_rate if paced else math.inf
    answered = 0

    async def one(request: bytes) -> Outcome:
        nonlocal answered
        arrived = time.perf_counter()
        async with seats:
            outcome = await send(session, settings.url, request)
        outcome.queued = outcome.started - arrived
        answered += 1
        tell(answered, len(bodies))
        return outcome

    gc.collect()
    gc.freeze()  # prompts and bodies stay: a collection between two tokens need not walk them
    try:
        async with asyncio.TaskGroup() as group:
            times = arrivals(len(bodies), rate, settings.burstiness, settings.seed)
            tasks = [group.create_task(one(bodies[i])) async for i in _paced(times)]
    finally:
        gc.unfreeze()
    return [task.result() for task in tasks]


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which requests are due, as vLLM's benchmark draws them.

    Intervals are gamma-distributed with shape `burstiness` and mean 1 ÷ `rate`: 1 is a Poisson process, less comes in
    bursts, more is steadier, infinity is a clock. They are scaled so that the last request is due at `count` ÷ `rate`,
    which takes the chance out of the rate. An infinite rate sends all at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    draw = random.Random(f"{seed} arrivals")
    due, times = 0.0, []
    for _ in range(count):
        due += 1.0 if math.isinf(burstiness) else draw.gammavariate(burstiness, 1.0)
        times.append(due)
    return [time * (count / rate) / due for time in times]


async def _paced(times: Sequence[float]) -> AsyncIterator[int]:
    """The index of each request when it is due."""
    started = time.perf_counter()
    for i, due in enumerate(times):
        wait = started + due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        yield i


# -- after it ----------------------------------------------------------------------------------------------
def _complete(asked: Sequence[Sample], outcomes: Sequence[Outcome], counter: Counter | None) -> list[str]:
    """Fill in the counts that the server did not tell; returns what is to be said about them."""
    untold = 0
    for sample, outcome in zip(asked, outcomes, strict=True):
        if outcome.prompt_tokens is None:
            outcome.prompt_tokens = sample.prompt_tokens
        if outcome.output_tokens is None and outcome.failure is None:
            untold += 1
            local = counter.count_answer(outcome.text) if isinstance(counter, LocalTokenizer) else 0
            outcome.output_tokens = local or outcome.arrivals
    if not untold:
        return []
    by = "the tokenizer" if isinstance(counter, LocalTokenizer) else "the events they came in"
    return [f"{untold} answers came without usage: their tokens are counted by {by}."]


def _about(settings: ServingSettings, model: str) -> dict[str, Any]:
    """What was measured, in the names of vLLM's result files."""
    rate = settings.request_rate
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": settings.backend,
        "backend": settings.backend,
        "base_url": settings.root,
        "model_id": model,
        "tokenizer_id": settings.tokenizer,
        "dataset_name": settings.dataset.name,
        "num_prompts": settings.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": "inf" if math.isinf(settings.burstiness) else settings.burstiness,
        "max_concurrency": settings.max_concurrency,
        "seed": settings.seed,
    }
