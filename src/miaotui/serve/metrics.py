"""What a server counts, in Prometheus' text format, under the names that vLLM's dashboards know.

The engine counts for itself: of a step only its last snapshot is kept, and gauges and counters are made of it when
somebody looks. What is left are histograms, fed on the event loop once for each step and each request that grew or
ended. They are our own and not the client library's: a step with 32 streams costs 7 µs where those take 33, and one
call takes in all tokens of an answer that did not stream.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from miaotui.engine.request import RequestOutput
from miaotui.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "miaotui:"

# Bounds as vLLM has them (v1/metrics/loggers.py), and below its first ones some that a small model on a CPU needs.
FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160]
FIRST_TOKEN += [640, 2560]
BETWEEN = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
BETWEEN += [20, 40, 80]
REQUEST = [0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920]
REQUEST += [7680]
TOKENS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
STEP = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Sequences in the step.", lambda stats: stats.running),
    "num_requests_waiting": ("Sequences that wait for a seat in the step.", lambda stats: stats.waiting),
    "kv_cache_usage_perc": ("Share of the KV cache that is held, 0 to 1.", lambda stats: stats.kv_usage),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": (
        "Prompt tokens of requests that have begun to run, cached ones included.",
        lambda stats: stats.prompt_tokens,
    ),
    "generation_tokens": ("Tokens generated.", lambda stats: stats.generated_tokens),
    "prefix_cache_queries": ("Tokens looked for in the prefix cache.", lambda stats: stats.prefix_queries),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", lambda stats: stats.prefix_hits),
    "num_preemptions": ("Sequences put back to wait because the cache was full.", lambda stats: stats.preemptions),
    "spec_decode_num_drafts": ("Guesses that were tried.", lambda stats: stats.drafts),
    "spec_decode_num_draft_tokens": ("Tokens that were guessed.", lambda stats: stats.tokens_drafted),
    "spec_decode_num_accepted_tokens": ("Guessed tokens that came true.", lambda stats: stats.drafts_accepted),
}
"""Help and value by name; `_total` is appended."""


class Histogram:
    """Counts of values by size. Not for several threads."""

    __slots__ = ("_bounds", "_counts", "_sum", "_text", "name")

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        """`bounds` ascend; a value belongs to the first that is not below it, or to none."""
        self.name = name
        self._text = text
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Take in `value`, as often as `times` says."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, model: str) -> Metric:
        family = HistogramMetricFamily(PREFIX + self.name, self._text, labels=["model_name"])
        edges = [*map(str, self._bounds), "+Inf"]
        family.add_metric([model], list(zip(edges, accumulate(self._counts), strict=True)), self._sum)
        return family


@dataclass(slots=True)
class _Stream:
    """What is remembered of a streaming request."""

    last: float
    """When it last grew."""
    tokens: int = 0


class Metrics(Collector):
    """One server's figures, in a registry of their own. Used on the event loop's thread alone.

    Of a request that was aborted (its client left, its time was up) there is no latency and no length, as in vLLM;
    it counts in `request_success_total{finished_reason="abort"}`.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._model = model_name
        self._stats: EngineStats | None = None
        self._streams: dict[str, _Stream] = {}
        self._first = Histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN)
        self._between = Histogram(
            "inter_token_latency_seconds",
            "Between a request's tokens: the mean of those that came at once, as all do where it does not stream.",
            BETWEEN,
        )
        self._whole = Histogram("e2e_request_latency_seconds", "From arrival to the end of the answer.", REQUEST)
        self._queue = Histogram("request_queue_time_seconds", "From arrival to the first step.", REQUEST)
        self._prompt = Histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._generation = Histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)
        self._step = Histogram(
            "iteration_tokens_total", "Tokens that a step ran through the model: of prompts, answers and guesses.", STEP
        )

    def observe(self, stats: EngineStats, outputs: Sequence[RequestOutput]) -> None:
        """Take in a step: the engine's state after it, and what requests got from it."""
        before, self._stats = self._stats, stats
        steps = stats.steps - (before.steps if before is not None else 0)
        if steps:  # several that ran on are alike
            self._step.observe((stats.step_tokens - (before.step_tokens if before is not None else 0)) / steps, steps)
        now = time.monotonic()
        for output in outputs:
            if output.finished:
                self._end(output, now)
            else:
                self._grow(output, now)
        if not stats.running and not stats.waiting:
            self._streams.clear()  # of requests that failed with their step nothing more is heard

    def render(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All figures, for the registry."""
        stats = self._stats
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model], value(stats) if stats is not None else 0)
            yield gauge
        for name, (text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model], value(stats) if stats is not None else 0)
            yield counter
        yield self._accepted(stats)
        yield self._success(stats)
        for histogram in (self._first, self._between, self._whole, self._queue, self._prompt, self._generation):
            yield histogram.family(self._model)
        yield self._step.family(self._model)

    def _accepted(self, stats: EngineStats | None) -> Metric:
        text = "Guessed tokens that came true, by their place in the guess, from 0. Only with speculation."
        family = CounterMetricFamily(
            f"{PREFIX}spec_decode_num_accepted_tokens_per_pos", text, labels=["model_name", "position"]
        )
        for position, count in enumerate(stats.accepted_by_position if stats is not None else ()):
            family.add_metric([self._model, str(position)], count)
        return family

    def _success(self, stats: EngineStats | None) -> Metric:
        labels = ["model_name", "finished_reason"]
        family = CounterMetricFamily(f"{PREFIX}request_success", "Sequences that ended, by the reason.", labels=labels)
        for reason in ("stop", "length", "abort"):
            family.add_metric([self._model, reason], stats.finished[reason] if stats is not None else 0)
        return family

    def _grow(self, output: RequestOutput, now: float) -> None:
        """A stream has grown."""
        stream = self._streams.get(output.request_id)
        if stream is None:
            stream = self._streams[output.request_id] = _Stream(now)
            self._observe_first(output)
        else:
            self._observe_growth(stream, output, now)
            stream.last = now
        for choice in output.outputs:
            stream.tokens += len(choice.token_ids)

    def _end(self, output: RequestOutput, now: float) -> None:
        """A request has ended."""
        tokens = sum(len(choice.token_ids) for choice in output.outputs)
        times, stream = output.metrics, self._streams.pop(output.request_id, None)
        if any(choice.finish_reason == "abort" for choice in output.outputs):
            return
        end = times.finished_time if times.finished_time is not None else now
        if stream is not None:
            self._observe_growth(stream, output, now)
            tokens += stream.tokens
        else:
            self._observe_first(output)
            self._observe_between(output, end)
        self._whole.observe(end - times.arrival_time)
        if times.first_scheduled_time is not None:
            self._queue.observe(times.first_scheduled_time - times.arrival_time)
        self._prompt.observe(len(output.prompt_token_ids))
        self._generation.observe(tokens)

    def _observe_first(self, output: RequestOutput) -> None:
        times = output.metrics
        if times.first_token_time is not None:
            self._first.observe(times.first_token_time - times.arrival_time)

    def _observe_growth(self, stream: _Stream, output: RequestOutput, now: float) -> None:
        """Of what a stream got at once: the mean, once for each token of the continuation that grew most."""
        grown = max((len(choice.token_ids) for choice in output.outputs), default=0)
        if grown:
            self._between.observe((now - stream.last) / grown, grown)

    def _observe_between(self, output: RequestOutput, end: float) -> None:
        """Of an answer that came at once: the mean, once for each token of its longest continuation but the first."""
        following = max((len(choice.token_ids) for choice in output.outputs), default=0) - 1
        if following > 0 and output.metrics.first_token_time is not None:
            self._between.observe((end - output.metrics.first_token_time) / following, following)
