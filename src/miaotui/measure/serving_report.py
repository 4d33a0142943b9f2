"""From the outcomes of requests to a report with the names of vLLM's `bench serve`, and to a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from miaotui.measure.report import number
from miaotui.measure.serving_client import Outcome

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token, first left out",
    "itl": "between two arrivals of tokens",
    "e2el": "request, end to end",
    "client_queue_time": "waited in the generator",
    "e2el_including_client_queue": "request, that wait included",
}
"""What latencies are told of, by vLLM's names. All in milliseconds."""
GOALS = ("ttft", "tpot", "e2el")
"""Those that a request as a whole has, so that it can meet a goal."""

Values = NDArray[np.float64]


def report(
    outcomes: Sequence[Outcome],
    seconds: float,
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """The figures of a run that took `seconds`. `goodput` has the most milliseconds that a good request takes.

    Keys and meanings are those of vLLM's `benchmarks/serve.py`, with `failures` by cause besides. A latency that
    nothing was measured of is None. The lists of `DETAILS` have an entry for each request.
    """
    done = [outcome for outcome in outcomes if outcome.failure is None]
    prompt = sum(outcome.prompt_tokens or 0 for outcome in done)
    output = sum(outcome.output_tokens or 0 for outcome in done)
    peak_tokens, peak_requests = _peaks(done)
    values = latencies(done)
    figures: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "failures": failures(outcomes),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / seconds,
        "request_goodput": _good(values, goodput) / seconds if goodput else None,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }
    for name in metrics:
        figures |= _spread(name, values[name][~np.isnan(values[name])] * 1e3, percentiles)
    return figures | details(outcomes)


def details(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """What vLLM saves of each request when it is asked for details."""
    return {
        "input_lens": [outcome.prompt_tokens for outcome in outcomes],
        "output_lens": [0 if outcome.failure else outcome.output_tokens for outcome in outcomes],
        "ttfts": [outcome.first for outcome in outcomes],
        "itls": [outcome.gaps for outcome in outcomes],
        "latencies": [outcome.latency for outcome in outcomes],
        "start_times": [outcome.started for outcome in outcomes],
        "queue_times": [outcome.queued for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [str(outcome.failure or "") for outcome in outcomes],
    }


DETAILS = tuple(details(()))


def latencies(done: Sequence[Outcome]) -> dict[str, Values]:
    """Seconds by metric: one for each request, but for `itl`; NaN where an answer of one token has no `tpot`."""
    first = np.array([outcome.first for outcome in done], dtype=np.float64)
    whole = np.array([outcome.latency for outcome in done], dtype=np.float64)
    rest = np.array([(outcome.output_tokens or 0) - 1 for outcome in done], dtype=np.float64)
    queued = np.array([outcome.queued for outcome in done], dtype=np.float64)
    return {
        "ttft": first,
        "tpot": (whole - first) / np.where(rest > 0, rest, np.nan),
        "itl": np.array([gap for outcome in done for gap in outcome.gaps], dtype=np.float64),
        "e2el": whole,
        "client_queue_time": queued,
        "e2el_including_client_queue": whole + queued,
    }


def failures(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """How many failed of each cause, the most frequent first, each with the first one's message."""
    found = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    counts = Counter(failure.cause for failure in found).most_common()
    example = {failure.cause: failure.detail for failure in reversed(found)}
    return [{"cause": cause, "count": count, "example": example[cause]} for cause, count in counts]


def _good(values: Mapping[str, Values], goodput: Mapping[str, float]) -> int:
    """Requests that meet every goal (DistServe, arXiv:2401.09670, §2.3). One token has no time per token to miss."""
    good = np.ones(len(values["ttft"]), dtype=bool)
    for name, most in goodput.items():
        good &= np.nan_to_num(values[name]) * 1e3 <= most
    return int(good.sum())


def _peaks(done: Sequence[Outcome]) -> tuple[float, int]:
    """The most arrivals of tokens in any second since the first request, and the most requests at one time."""
    if not done:
        return 0.0, 0
    begin = min(outcome.started for outcome in done)
    times = [outcome.started - begin + np.cumsum([outcome.first, *outcome.gaps]) for outcome in done]
    tokens = np.bincount(np.concatenate(times).astype(np.int64))
    moments = [(outcome.started, 1) for outcome in done] + [(outcome.started + outcome.latency, -1) for outcome in done]
    return float(tokens.max()), int(np.cumsum([change for _, change in sorted(moments)]).max())


def _spread(name: str, values: Values, percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles."""
    some = len(values) > 0
    figures: dict[str, float | None] = {
        f"mean_{name}_ms": float(values.mean()) if some else None,
        f"median_{name}_ms": float(np.median(values)) if some else None,
        f"std_{name}_ms": float(values.std()) if some else None,
    }
    for percentile in percentiles:
        figures[percentile_key(name, percentile)] = float(np.percentile(values, percentile)) if some else None
    return figures


def percentile_key(name: str, percentile: float) -> str:
    """`p99_ttft_ms`, `p99.9_ttft_ms`."""
    return f"p{percentile:g}_{name}_ms"


# -- for people ----------------------------------------------------------------------------------------------
def table(found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> RenderableType:
    """The report as a table of latencies under some lines on what was done."""
    names = ("mean", "median", "std", *(f"p{percentile:g}" for percentile in percentiles))
    rows = Table("milliseconds", *names, box=None, pad_edge=False)
    for column in rows.columns[1:]:
        column.justify = "right"
    for name in metrics:
        keys = [f"{kind}_{name}_ms" for kind in names[:3]] + [percentile_key(name, p) for p in percentiles]
        rows.add_row(METRICS[name], *("" if found[key] is None else number(found[key]) for key in keys))
    return Group(*(Text(line) for line in heading(found)), rows)


def heading(found: Mapping[str, Any]) -> list[str]:
    """What was asked of which server, and the throughputs."""
    limit = found["max_concurrency"]
    width = f"at most {limit} at a time" if limit else f"up to {found['max_concurrent_requests']} at a time"
    rate = "all at once" if found["request_rate"] == "inf" else f"{found['request_rate']:g} requests/s offered"
    good = "" if found["request_goodput"] is None else f" ({number(found['request_goodput'])} of them good)"
    output, peak = number(found["output_throughput"]), number(found["max_output_tokens_per_s"])
    done, failed, seconds = found["completed"], found["failed"], found["duration"]
    lines = [
        f"{found['model_id']} at {found['base_url']}",
        f"{done} requests answered, {failed} failed, in {seconds:.2f} s: {rate}, {width}",
        *(f"failed {each['count']} times: {each['cause']}: {each['example']}" for each in found["failures"]),
        f"{found['total_input_tokens']:,} tokens in, {found['total_output_tokens']:,} out",
        f"{number(found['request_throughput'])} requests/s{good}; {output} output tokens/s, {peak} in the best second; "
        f"{number(found['total_token_throughput'])} tokens/s in and out",
        f"the generator used {found['client_cpu_seconds'] / seconds:.0%} of a core",
    ]
    return [*lines, *found["notes"], ""]
