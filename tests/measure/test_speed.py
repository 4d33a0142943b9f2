"""The regimes over a model whose clock we turn: figures must be exactly what the clock says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from miaotui.engine.params import SamplingParams
from miaotui.errors import UsageError
from miaotui.hardware.ceilings import Probes
from miaotui.measure import speed
from tests.measure.test_work import make_spec

PROBES = Probes(lambda threads, megabytes, seconds: [1.0], lambda t, s: 0.01, lambda t, s: 0.001)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SteadyLLM:
    """Half a second to load and to the first token, 10 ms for each of the others, 4 s for a batch."""

    def __init__(self, clock: Clock, prompts: list[tuple[int, ...]]) -> None:
        clock.now += 0.5
        self.clock, self.prompts = clock, prompts
        self.spec = make_spec()
        self.tokenizer = SimpleNamespace(encode=lambda text: range(1_000_000))
        shape = SimpleNamespace(max_model_len=1024)
        sizes = {"weight_bytes": 10_000, "greedy_bytes": 10_000, "block_bytes": 4096}
        self.engine = SimpleNamespace(executor=SimpleNamespace(**sizes, shape=shape))
        self.closed = False

    def stream(self, prompt: dict[str, list[int]], params: SamplingParams) -> Iterator[Any]:
        self.prompts.append(tuple(prompt["prompt_token_ids"]))
        assert params.ignore_eos
        assert params.greedy
        for index in range(params.max_tokens or 0):
            self.clock.now += 0.01 if index else 0.5
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])])

    def generate(self, prompts: list[dict[str, list[int]]], params: SamplingParams) -> list[Any]:
        self.prompts += [tuple(prompt["prompt_token_ids"]) for prompt in prompts]
        self.clock.now += 4.0
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * (params.max_tokens or 0))]) for _ in prompts]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Replaces LLM and the clock; the prompts that the model is given."""
    seen: list[tuple[int, ...]] = []
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    monkeypatch.setattr(speed, "LLM", lambda model, **options: SteadyLLM(clock, seen))
    return seen


def test_figures_and_the_contract(prompts: list[tuple[int, ...]]) -> None:
    settings = speed.Settings("tiny", {"threads": 2}, ["--threads", "2"])
    names = ["load", "prefill-512", "decode-1@16", "decode-1@512", "throughput-8"]
    report = json.loads(json.dumps(speed.run(settings, PROBES, names=names, repeat=2)))
    results = {result["regime"]: result for result in report["results"]}
    assert list(results) == names
    for result in results.values():
        assert {"regime", "unit", "median", "low", "high", "p99", "ceiling"} <= set(result)
        assert result["low"] <= result["median"] <= result["high"]
    medians = {name: result["median"] for name, result in results.items()}
    expected = {"load": 0.5, "prefill-512": 1024, "decode-1@16": 100, "decode-1@512": 100, "throughput-8": 8 * 128 / 4}
    assert medians == pytest.approx(expected)
    assert results["decode-1@16"]["samples"] == 2 * speed.DECODE_TOKENS
    assert results["decode-1@16"]["ceiling"] == pytest.approx(1e9 / (10_000 + 256 * 31))
    assert results["decode-1@512"]["ceiling"] < results["decode-1@16"]["ceiling"]
    assert report["model"]["weight_bytes"] == 10_000
    assert report["machine"]["fingerprint"]
    assert report["machine"]["ceilings"]["threads"] == 2


def test_no_prompt_twice(prompts: list[tuple[int, ...]]) -> None:
    speed.run(speed.Settings("tiny", {}, []), PROBES, names=["prefill-512", "throughput-8"], repeat=2)
    assert len(set(prompts)) == len(prompts) == 3 * (1 + 8)


def test_regimes_are_those_of_the_contract() -> None:
    assert list(speed.regimes()) == [
        "start", "load", "peak-memory", "prefill-512", "decode-1@16", "decode-1@512", "throughput-8", "throughput-64",
        "decode-1@long",
    ]  # fmt: skip
    assert [regime.name for regime in speed.select(None)] == list(speed.regimes())[:-1]


def test_an_unknown_regime_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match="no regime called 'fast'"):
        speed.run(speed.Settings("/nowhere", {}, []), PROBES, names=["fast"])


def test_the_longest_context_leaves_room_to_decode(prompts: list[tuple[int, ...]]) -> None:
    report = speed.run(speed.Settings("tiny", {}, []), PROBES, names=["decode-1@long"], repeat=1)
    assert {len(prompt) for prompt in prompts} == {1024 - speed.DECODE_TOKENS - 1}
    assert report["results"][0]["median"] == pytest.approx(100)


def test_models_take_turns_until_the_time_is_over(prompts: list[tuple[int, ...]]) -> None:
    """A prompt takes half a second, a batch four: a round of both models 9 s, the warm-up as long."""
    several = [speed.Settings("a", {}, []), speed.Settings("b", {}, [])]
    names = ["prefill-512", "throughput-8"]
    first, second = speed.run_beside(several, PROBES, names=names, repeat=50, seconds=30)
    for report, name in ((first, "a"), (second, "b")):
        assert report["model"]["name"] == name
        assert [result["samples"] for result in report["results"]] == [3, 2]  # a steady clock's are tight after three
    lengths = [len(prompt) for prompt in prompts]
    assert lengths[:4] == [512, 512, 128, 128]
    assert lengths[:2] + lengths[18:20] == [512] * 4


def test_in_a_hurry_the_warm_up_counts_and_the_rest_is_left_out(prompts: list[tuple[int, ...]]) -> None:
    names = ["throughput-8", "prefill-512"]
    report = speed.run_beside([speed.Settings("a", {}, [])], PROBES, names=names, repeat=50, seconds=0)[0]
    assert [(result["regime"], result["samples"]) for result in report["results"]] == [("throughput-8", 1)]
    assert report["results"][0]["median"] == pytest.approx(8 * 128 / 4)
    report = speed.run_beside([speed.Settings("a", {}, [])], PROBES, names=names, repeat=50, seconds=6)[0]
    assert [(result["regime"], result["samples"]) for result in report["results"]] == [
        ("throughput-8", 1),
        ("prefill-512", 3),
    ]
