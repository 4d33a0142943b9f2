"""What /metrics says, against what was asked; the dashboard asks for nothing else."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from openai import OpenAI
from prometheus_client import Histogram as ClientHistogram
from prometheus_client.parser import text_string_to_metric_families

from miaotui.engine.params import SamplingParams
from miaotui.engine.request import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from miaotui.engine.stats import EngineStats
from miaotui.serve import metrics as module
from miaotui.serve.app import create_app
from miaotui.serve.metrics import Histogram, Metrics
from miaotui.serve.service import Service
from miaotui.serve.settings import ServeSettings
from miaotui.serve.worker import Mailbox, Order
from tests.serve.serving import MODEL, Server, serving

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def server(demo_gguf: Path) -> Iterator[Server]:
    def make(service: Service, settings: ServeSettings) -> Any:
        metrics = Metrics(MODEL)
        service._observe = metrics.observe
        return create_app(service, settings, metrics=metrics)

    with serving(demo_gguf, make_app=make, max_num_seqs=4, max_model_len=512) as started:
        yield started


def _figures(server: Server) -> dict[str, float]:
    """Every series without its buckets, `name` or `name/reason`."""
    with urlopen(server.url + "/metrics") as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == MODEL
            if "le" not in sample.labels:
                reason = sample.labels.get("finished_reason")
                found[sample.name.removeprefix("miaotui:") + (f"/{reason}" if reason else "")] = sample.value
    return found


def test_a_request_is_counted(server: Server) -> None:
    before = _figures(server)
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(
            model=MODEL, prompt="Once upon a time, there was", max_tokens=9, extra_body={"ignore_eos": True}
        )
        stream = client.completions.create(
            model=MODEL, prompt="Water is", max_tokens=7, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in stream:
            pass
    server.quiet()
    after = _figures(server)
    grown = {name: after[name] - before[name] for name in before}
    assert whole.usage is not None
    assert grown["generation_tokens_total"] == 16
    assert grown["request_success_total/length"] == 2
    assert grown["request_success_total/stop"] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert grown[f"{name}_seconds_count"] == 2
        assert grown[f"{name}_seconds_sum"] >= 0
    assert grown["inter_token_latency_seconds_count"] == 8 + 6
    assert grown["request_generation_tokens_sum"] == 16
    assert grown["request_prompt_tokens_sum"] == grown["prompt_tokens_total"] == grown["prefix_cache_queries_total"]
    computed = grown["prompt_tokens_total"] - grown["prefix_cache_hits_total"]
    assert grown["iteration_tokens_total_sum"] == computed + 16 - 2, "the last token of an answer is not run"
    assert grown["e2e_request_latency_seconds_sum"] >= grown["time_to_first_token_seconds_sum"]
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


def test_an_abandoned_request_is_counted(server: Server) -> None:
    before = _figures(server)
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model=MODEL, prompt="Water is", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        assert _figures(server)["num_requests_running"] == 1
        stream.close()
    server.quiet()
    after = _figures(server)
    assert after["request_success_total/abort"] == before["request_success_total/abort"] + 1
    assert after["time_to_first_token_seconds_count"] == before["time_to_first_token_seconds_count"] + 1
    for name in ("e2e_request_latency_seconds", "request_generation_tokens"):
        assert after[f"{name}_count"] == before[f"{name}_count"], "it says nothing about the latency of answers"


def test_waiting_for_the_engine_counts(server: Server) -> None:
    """A request's time begins when it is made, not when the engine has finished its step and takes it."""
    before = _figures(server)

    async def submit() -> None:
        order = Order("late", [5, 6, 7], SamplingParams(max_tokens=1), 0, False, arrival_time=time.monotonic() - 100)
        mailbox = Mailbox()
        assert server.service._worker is not None
        server.service._worker.submit([order], mailbox)
        await mailbox.take()

    server.call(submit)
    server.quiet()
    after = _figures(server)
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert 100 <= after[f"{name}_seconds_sum"] - before[f"{name}_seconds_sum"] < 130


def test_every_name_is_there(server: Server) -> None:
    with urlopen(server.url + "/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    kinds: dict[str, set[str]] = {"gauge": set(), "counter": set(), "histogram": set()}
    for family in families:
        kinds[family.type].add(family.name.removeprefix("miaotui:"))
        assert family.documentation
    speculation = {"num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos"}
    assert kinds == {
        "gauge": {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"},
        "counter": {"prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"}
        | {"num_preemptions", "request_success"}
        | {f"spec_decode_{name}" for name in speculation},
        "histogram": {"time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"}
        | {"request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens"}
        | {"iteration_tokens_total"},
    }


# -- without a server ------------------------------------------------------------------------------------
def test_the_dashboard_shows_all_there_is_and_nothing_else() -> None:
    there = set(re.findall(r"^# TYPE (\S+) ", Metrics("m").render().decode(), re.M))
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name.removesuffix("_bucket") for query in queries for name in re.findall(r"miaotui:\w+", query)}
    assert asked == there
    for query in queries:
        assert query.count("(") == query.count(")")
        assert query.count('{model_name=~"$model"}') == len(re.findall(r"miaotui:\w+", query))
        for name in re.findall(r"miaotui:\w+_total\b(?!_)", query):
            assert f"rate({name}" in query, "a counter is looked at by its growth"


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """It has a data source to choose, no panel lies on another, and no number stands for two."""
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    source = {"type": "prometheus", "uid": "${datasource}"}
    datasource, model = dashboard["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    assert (model["name"], model["datasource"]) == ("model", source)
    places: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & places
        places |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert "id" not in dashboard, "the database's own, which an import must not have"


def _stats(**figures: Any) -> EngineStats:
    nothing: dict[str, Any] = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    finished = {"stop": 0, "length": 0, "abort": 0}
    return EngineStats(**{**nothing, "blocks": 8, "accepted_by_position": (), "finished": finished, **figures})


def _output(name: str, tokens: int, reason: FinishReason | None, times: RequestMetrics) -> RequestOutput:
    choice = CompletionOutput(0, "", [7] * tokens, finish_reason=reason)
    return RequestOutput(name, None, [1, 2, 3], [choice], reason is not None, times)


def _read(metrics: Metrics) -> dict[str, float]:
    """Every sample, under its name and its labels' values but for the model's."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = [value for label, value in sample.labels.items() if label != "model_name"]
            found[" ".join([sample.name.removeprefix("miaotui:"), *labels])] = sample.value
    return found


def test_a_histogram_is_the_client_librarys() -> None:
    dice = random.Random(3)
    bounds = [0.01, 0.5, 1, 20]
    ours = Histogram("h", "text", bounds)
    theirs = ClientHistogram("miaotui:h", "text", ("model_name",), buckets=bounds, registry=None)
    for value in [0.0, 0.01, 0.010001, 1.0, 20.0, 21.0, *(dice.expovariate(1) for _ in range(100))]:
        times = dice.randint(1, 3)
        ours.observe(value, times)
        for _ in range(times):
            theirs.labels("m").observe(value)
    (family,) = theirs.collect()
    wanted = {(s.name, tuple(s.labels.items())): s.value for s in family.samples if not s.name.endswith("_created")}
    found = {(s.name, tuple(s.labels.items())): s.value for s in ours.family("m").samples}
    assert found == pytest.approx(wanted)


def test_the_bounds_are_vllms_and_finer_ones() -> None:
    latencies = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0]
    between = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0]
    assert module.REQUEST[3:] == [*latencies, 960.0, 1920.0, 7680.0]
    assert module.BETWEEN[3:] == [*between, 80.0]
    assert module.TOKENS[:8] == [1, 2, 5, 10, 20, 50, 100, 200]
    for bounds in (module.FIRST_TOKEN, module.BETWEEN, module.REQUEST, module.TOKENS, module.STEP):
        assert bounds == sorted(set(bounds))


def test_everything_is_there_before_the_first_step() -> None:
    figures = _read(Metrics("m"))
    assert figures["request_success_total stop"] == figures["kv_cache_usage_perc"] == 0
    assert set(figures.values()) == {0.0}


def test_counters_are_the_engines() -> None:
    metrics = Metrics("m")
    stats = _stats(
        running=2,
        waiting=3,
        blocks_in_use=6,
        preemptions=4,
        prefix_queries=50,
        prefix_hits=16,
        steps=9,
        step_tokens=90,
        prompt_tokens=34,
        generated_tokens=77,
        drafts=5,
        tokens_drafted=11,
        drafts_accepted=7,
        accepted_by_position=(4, 3, 0),
        finished={"stop": 1, "length": 2, "abort": 3},
    )
    metrics.observe(stats, [])
    metrics.observe(stats, [])  # an order that was cancelled: no step has run
    figures = _read(metrics)
    assert (figures["num_requests_running"], figures["num_requests_waiting"]) == (2, 3)
    assert figures["kv_cache_usage_perc"] == 0.75
    assert (figures["prompt_tokens_total"], figures["generation_tokens_total"]) == (34, 77)
    assert (figures["prefix_cache_queries_total"], figures["prefix_cache_hits_total"]) == (50, 16)
    assert figures["num_preemptions_total"] == 4
    assert [figures[f"request_success_total {reason}"] for reason in ("stop", "length", "abort")] == [1, 2, 3]
    counts = [figures[f"spec_decode_num_{name}_total"] for name in ("drafts", "draft_tokens", "accepted_tokens")]
    assert counts == [5, 11, 7]
    assert [figures[f"spec_decode_num_accepted_tokens_per_pos_total {i}"] for i in range(3)] == [4, 3, 0]
    assert (figures["iteration_tokens_total_count"], figures["iteration_tokens_total_sum"]) == (9, 90)


def test_latencies_count_from_arrival() -> None:
    metrics = Metrics("m")
    times = RequestMetrics(100.0, 100.25, 101.0, 103.0)
    metrics.observe(_stats(), [_output("whole", 5, "stop", times)])
    figures = _read(metrics)
    assert figures["request_queue_time_seconds_sum"] == 0.25
    assert figures["time_to_first_token_seconds_sum"] == 1.0
    assert figures["e2e_request_latency_seconds_sum"] == 3.0
    assert (figures["inter_token_latency_seconds_sum"], figures["inter_token_latency_seconds_count"]) == (2.0, 4)
    assert (figures["request_prompt_tokens_sum"], figures["request_generation_tokens_sum"]) == (3, 5)


def test_an_aborted_request_has_no_latency() -> None:
    metrics = Metrics("m")
    metrics.observe(_stats(running=2), [_output("stream", 1, None, RequestMetrics(100.0, 100.5, 101.0))])
    cut_short = _output("stream", 0, "abort", RequestMetrics(100.0, 100.5, 101.0, 102.0))
    never_run = _output("waiting", 0, "abort", RequestMetrics(100.0, None, None, 102.0))
    metrics.observe(_stats(), [cut_short, never_run])
    figures = _read(metrics)
    assert figures["time_to_first_token_seconds_count"] == 1
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "inter_token_latency_seconds"):
        assert figures[f"{name}_count"] == 0
    assert figures["request_prompt_tokens_count"] == figures["request_generation_tokens_count"] == 0


def test_tokens_that_come_at_once_share_the_time() -> None:
    metrics, times = Metrics("m"), RequestMetrics(100.0, 100.5, 101.0)
    metrics.observe(_stats(running=1, steps=1, step_tokens=3), [_output("a", 1, None, times)])
    metrics._streams["a"].last -= 0.5
    metrics.observe(_stats(running=1, steps=6, step_tokens=8), [_output("a", 5, None, times)])
    figures = _read(metrics)
    assert figures["inter_token_latency_seconds_count"] == 5
    assert 0.5 <= figures["inter_token_latency_seconds_sum"] < 0.6
    assert figures["iteration_tokens_total_bucket 1.0"] == 5
    assert (figures["iteration_tokens_total_count"], figures["iteration_tokens_total_sum"]) == (6, 8)


def test_streams_that_are_lost_are_forgotten() -> None:
    """A step that fails takes its requests along, and nothing is said of each of them."""
    metrics, times = Metrics("m"), RequestMetrics(100.0, 100.5, 101.0)
    metrics.observe(_stats(running=2), [_output("a", 1, None, times), _output("b", 1, None, times)])
    metrics.observe(_stats(running=1), [_output("a", 1, None, times)])
    assert len(metrics._streams) == 2
    metrics.observe(_stats(), [])
    assert not metrics._streams


def test_nothing_is_global() -> None:
    one, two = Metrics("one"), Metrics("two")
    one.observe(_stats(generated_tokens=5), [])
    assert b'model_name="two"' not in one.render()
    assert _read(two)["generation_tokens_total"] == 0
