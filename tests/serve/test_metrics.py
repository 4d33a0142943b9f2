"""What /metrics says, against what was asked; the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from miaotui.serve.app import create_app
from miaotui.serve.metrics import Metrics
from miaotui.serve.service import Service
from miaotui.serve.settings import ServeSettings
from tests.serve.serving import MODEL, Server, serving

ROOT = Path(__file__).parents[2]


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
    assert grown["iteration_tokens_total_sum"] == grown["prompt_tokens_total"] + 16
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
    assert _figures(server)["request_success_total/abort"] == before["request_success_total/abort"] + 1


def test_every_name_is_there(server: Server) -> None:
    names = set(_figures(server))
    wanted = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
    wanted |= {
        "prompt_tokens_total",
        "generation_tokens_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
    }
    wanted |= {"num_preemptions_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"}
    for histogram in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        wanted |= {f"{histogram}_sum", f"{histogram}_count"}
    for histogram in ("request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens"):
        wanted |= {f"{histogram}_sum", f"{histogram}_count"}
    assert wanted <= names


def test_the_dashboard_asks_for_what_there_is(server: Server) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    with urlopen(server.url + "/metrics") as answer:
        there = set(re.findall(r"^(miaotui:\w+)\{", answer.read().decode(), re.M))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"miaotui:\w+", target["expr"])
    }
    assert len(asked) >= 16
    assert asked <= there
