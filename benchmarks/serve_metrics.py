"""What the server's metrics cost: `python -m benchmarks.serve_metrics`.

Microseconds on the event loop for a step, by the number of streams that grew in it, and for an answer of 512 tokens
that comes at once; milliseconds for a look at /metrics. The median of several rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from miaotui.engine.request import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from miaotui.engine.stats import EngineStats
from miaotui.serve.metrics import Metrics

ROUNDS = 7
STEPS = 1000
STREAMS = (1, 8, 32, 64)
FINISHED = {"stop": 0, "length": 0, "abort": 0}


def main() -> None:
    nothing: dict[str, Any] = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
    start = EngineStats(**nothing | {"blocks": 64, "running": 64, "accepted_by_position": (), "finished": FINISHED})
    stats = [replace(start, steps=step, step_tokens=64 * step) for step in range(STEPS)]
    times = RequestMetrics(0.0, 0.1, 0.2, 5.0)
    for streams in STREAMS:
        grown = [_output(f"request {i}", 1, None, times) for i in range(streams)]
        metrics = Metrics("measured")

        def steps(metrics: Metrics = metrics, grown: list[RequestOutput] = grown) -> None:
            for state in stats:
                metrics.observe(state, grown)

        print(f"a step with {streams:2} streams   {_seconds(steps) / STEPS * 1e6:6.1f} µs")
    metrics, ended = Metrics("measured"), [_output("whole", 512, "length", times)]
    print(f"512 tokens at once      {_seconds(lambda: metrics.observe(start, ended)) * 1e6:6.1f} µs")
    print(f"a look at /metrics      {_seconds(metrics.render) * 1e3:6.2f} ms")


def _output(name: str, tokens: int, reason: FinishReason | None, times: RequestMetrics) -> RequestOutput:
    choice = CompletionOutput(0, "", [1] * tokens, finish_reason=reason)
    return RequestOutput(name, None, [1] * 100, [choice], reason is not None, times)


def _seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
