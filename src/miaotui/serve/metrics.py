"""What a server counts, in Prometheus' text format, under the names that vLLM's dashboards know.

Everything is fed on the event loop: once for each step of the engine, from the difference of two snapshots, and once
for each request that ends.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from miaotui.engine.engine import EngineStats
from miaotui.engine.request import RequestOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_GROWING = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked for in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("preemptions", "Sequences put back to wait because the cache was full."),
    "spec_decode_num_draft_tokens": ("tokens_drafted", "Tokens that speculation proposed."),
    "spec_decode_num_accepted_tokens": ("drafts_accepted", "Proposed tokens that came true."),
}
"""Counters and the fields of EngineStats that they follow. The client appends `_total`."""

_NAME = "miaotui:"


class Metrics:
    """One server's figures, in a registry of their own. Used on the event loop's thread alone."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._label = model_name
        self._before: EngineStats | None = None
        self._last_token: dict[str, float] = {}
        """When each streaming request last grew."""
        self._running = self._gauge("num_requests_running", "Sequences in the step.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a seat in the step.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache that is held, 0 to 1.")
        self._counters = {field: self._counter(name, text) for name, (field, text) in _GROWING.items()}
        self._success = Counter(
            f"{_NAME}request_success",
            "Sequences that ended, by the reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(model_name, reason)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._between = self._histogram(
            "inter_token_latency_seconds",
            "Between a request's tokens. For one that does not stream, its mean, once for each token.",
            _BETWEEN,
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end of the answer.", _REQUEST)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _REQUEST)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._step = self._histogram("iteration_tokens_total", "Tokens that a step computed.", _STEP)
        self._generated: dict[str, int] = {}

    def observe(self, stats: EngineStats, outputs: list[RequestOutput]) -> None:
        """Take in a step: the engine's state after it, and what requests got from it."""
        before, self._before = self._before, stats
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._usage.set(stats.kv_usage)
        for field, counter in self._counters.items():
            grown = getattr(stats, field) - (getattr(before, field) if before is not None else 0)
            if grown:
                counter.inc(grown)
        for reason, count in stats.finished.items():
            grown = count - (before.finished.get(reason, 0) if before is not None else 0)
            if grown:
                self._success.labels(self._label, reason).inc(grown)
        if before is None or stats.steps > before.steps:
            self._step.observe(_computed(stats) - (_computed(before) if before is not None else 0))
        now = time.monotonic()
        for output in outputs:
            self._observe_output(output, now)

    def render(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)

    def _observe_output(self, output: RequestOutput, now: float) -> None:
        tokens = sum(len(choice.token_ids) for choice in output.outputs)
        name, times = output.request_id, output.metrics
        known = name in self._last_token
        if known or not output.finished:  # a stream, token by token
            since = self._last_token.get(name)
            self._last_token[name] = now
            if since is not None and tokens:
                self._between.observe(now - since)
            elif times.first_token_time is not None and not known:
                self._first.observe(times.first_token_time - times.arrival_time)
            self._generated[name] = self._generated.get(name, 0) + tokens
        if output.finished:
            self._observe_end(output, known, tokens, now)

    def _observe_end(self, output: RequestOutput, streamed: bool, tokens: int, now: float) -> None:
        name, times = output.request_id, output.metrics
        end = times.finished_time if times.finished_time is not None else now
        self._last_token.pop(name, None)
        if streamed:
            tokens = self._generated.pop(name)
        elif times.first_token_time is not None:
            self._first.observe(times.first_token_time - times.arrival_time)
            following = max(output_len(output) - 1, 0)
            for _ in range(following):
                self._between.observe((end - times.first_token_time) / following)
        self._whole.observe(end - times.arrival_time)
        if times.first_scheduled_time is not None:
            self._queue.observe(times.first_scheduled_time - times.arrival_time)
        self._prompt.observe(len(output.prompt_token_ids))
        self._generation.observe(tokens)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(_NAME + name, text, ("model_name",), registry=self._registry).labels(self._label)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(_NAME + name, text, ("model_name",), registry=self._registry).labels(self._label)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(_NAME + name, text, ("model_name",), buckets=buckets, registry=self._registry)
        return made.labels(self._label)


def output_len(output: RequestOutput) -> int:
    """Tokens of the longest continuation: what the time between tokens counts."""
    return max((len(choice.token_ids) for choice in output.outputs), default=0)


def _computed(stats: EngineStats) -> int:
    return stats.prompt_tokens + stats.generated_tokens
