"""The load generator against a small real server: what it sends, what it counts, what it makes of failures."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miaotui.errors import MiaotuiError, ResourceError, UsageError
from miaotui.measure.serving import ServingSettings, arrivals, run
from miaotui.measure.serving_client import EventReader, Failure, Outcome
from miaotui.measure.serving_data import Counter, Dataset, LocalTokenizer, random_text, samples
from miaotui.measure.serving_report import details, report
from tests.measure.fake_server import BETWEEN, FIRST, Fake, serving

SHORT = Dataset(input_len=9, output_len=5)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


def measured(fake: Fake, **options: Any) -> dict[str, Any]:
    return run(ServingSettings(base_url=fake.url, **{"dataset": SHORT, "num_prompts": 6, **options}))


# -- what is sent, and counted -------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_requests_and_figures(fake: Fake, backend: str) -> None:
    told: list[tuple[int, int]] = []
    settings = ServingSettings(base_url=fake.url + "/v1/", backend=backend, dataset=SHORT, num_prompts=6)  # type: ignore[arg-type]
    found = run(settings, lambda done, total: told.append((done, total)))

    assert told == [(i, 6) for i in range(1, 7)]
    assert len(fake.asked) == 7  # and the trial
    for body in fake.asked:
        text = body["messages"][0]["content"] if backend == "openai-chat" else body["prompt"]
        assert len(text.split()) == 8  # and BOS
        assert (body["model"], body["max_tokens"], body["stream"]) == ("org/fake", 5, True)
        assert "ignore_eos" not in body
    assert len({json.dumps(body) for body in fake.asked}) == 7, "no prompt twice: a cached prefix would help"

    assert (found["completed"], found["failed"], found["failures"], found["notes"]) == (6, 0, [], [])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (54, 30)
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])
    assert found["total_token_throughput"] == pytest.approx(84 / found["duration"])
    assert found["request_goodput"] is None
    assert found["max_concurrent_requests"] <= 6
    assert found["generated_texts"] == ["w0 w1 w2 w3 w4 "] * 6
    for first, gaps, latency in zip(found["ttfts"], found["itls"], found["latencies"], strict=True):
        assert first >= FIRST * 0.9
        assert len(gaps) == 4, "one for each token but the first; a chat's opening is no token"
        assert latency == pytest.approx(first + sum(gaps))
        assert latency >= FIRST + 3 * BETWEEN


def test_the_keys_are_those_of_vllm(fake: Fake) -> None:
    found = measured(fake, num_prompts=2, metric_percentiles=(50.0, 99.9), goodput={"ttft": 1e6})
    for metric, kind in itertools.product(("ttft", "tpot", "itl", "e2el"), ("mean", "median", "std", "p50", "p99.9")):
        assert isinstance(found[f"{kind}_{metric}_ms"], float)
    assert {
        *("date", "endpoint_type", "backend", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness"),
        *("max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
        *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
        *("max_output_tokens_per_s", "max_concurrent_requests", "input_lens", "output_lens", "ttfts", "itls"),
        *("start_times", "generated_texts", "errors"),
    } <= set(found)
    assert found["request_goodput"] == found["request_throughput"]
    json.dumps(found, allow_nan=False)


def test_what_goes_along_with_a_request(fake: Fake) -> None:
    extra = {"ignore_eos": True, "extra_body": {"top_k": 5}, "headers": {"Authorization": "Bearer sk-1"}}
    measured(fake, num_prompts=1, num_warmups=3, model="another", **extra)
    assert len(fake.asked) == 1 + 3 + 1
    for body, headers in zip(fake.asked, fake.headers, strict=True):
        assert (body["ignore_eos"], body["top_k"], body["model"]) == (True, 5, "another")
        assert headers["Authorization"] == "Bearer sk-1"


def test_max_concurrency_holds(fake: Fake) -> None:
    found = measured(fake, num_prompts=9, max_concurrency=3, percentile_metrics=("client_queue_time",))
    assert fake.peak == 3
    assert found["max_concurrent_requests"] <= 3
    assert sorted(found["queue_times"])[3:] > [FIRST] * 6, "six of nine had to wait for others"
    assert found["mean_client_queue_time_ms"] > 0
    assert "mean_ttft_ms" not in found


@pytest.mark.parametrize(("tokenizer", "words"), [("vllm", 8), ("llama.cpp", 8), ("none", 9)])
def test_lengths_by_the_servers_own_count(tokenizer: str, words: int) -> None:
    with serving(Fake(tokenizer=tokenizer)) as fake:
        found = measured(fake, num_prompts=2)
    assert [len(body["prompt"].split()) for body in fake.asked] == [words] * 3
    assert found["total_input_tokens"] == 2 * (words + 1), "usage has the last word"
    assert bool(found["notes"]) == (tokenizer == "none")


def test_without_usage_arrivals_are_counted() -> None:
    with serving(Fake(usage=False)) as fake:
        found = measured(fake, num_prompts=3)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (27, 15)
    assert "without usage" in found["notes"][0]


def test_a_prompt_of_megabytes(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "word " * 300_000, "output_tokens": 1}))
    found = measured(fake, dataset=Dataset(name="custom", path=file), num_prompts=1)
    assert (found["total_input_tokens"], found["failures"]) == (300_001, [])


# -- failures ------------------------------------------------------------------------------------------------
def test_failures_are_counted_by_cause(fake: Fake) -> None:
    fake.faults = ["", "429", "cut", "drop", "error", "429", "empty", "broken", "whole", ""]
    found = measured(fake, num_prompts=9, max_concurrency=1)
    causes = {failure["cause"]: failure["count"] for failure in found["failures"]}
    assert causes == {
        "HTTP 429": 2,
        "stream cut short": 1,
        "connection lost": 1,
        "error in the stream": 1,
        "empty answer": 1,
        "not OpenAI's events": 1,
        "no stream": 1,
    }
    assert found["failures"][0] == {"cause": "HTTP 429", "count": 2, "example": "fault 2"}
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (1, 8, 5)
    assert [bool(error) for error in found["errors"]] == [True] * 8 + [False]
    assert "out of luck" in found["errors"][3]


def test_all_failed_is_a_report_too(fake: Fake) -> None:
    fake.faults = ["", "500", "500"]
    found = measured(fake, num_prompts=2, goodput={"tpot": 1.0})
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 2, 0)
    assert found["mean_ttft_ms"] is found["p99_itl_ms"] is None


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("401", UsageError, "--api-key"),
        ("404", UsageError, "--model"),
        ("400", UsageError, "lengths"),
        ("503", ResourceError, "log"),
        ("cut", ResourceError, "log"),
    ],
)
def test_a_trial_that_fails_ends_it(fake: Fake, fault: str, kind: type[MiaotuiError], said: str) -> None:
    fake.faults = [fault]
    with pytest.raises(kind) as raised:
        measured(fake)
    assert said in raised.value.hint
    assert fake.url in raised.value.message
    assert len(fake.asked) == 1


def test_no_server() -> None:
    with pytest.raises(ResourceError, match="There is no server at"):
        run(ServingSettings(base_url="http://127.0.0.1:9", dataset=SHORT))


def test_settings_that_mean_nothing() -> None:
    for wrong in (
        {"percentile_metrics": ("speed",)},
        {"goodput": {"itl": 5.0}},
        {"metric_percentiles": (101.0,)},
        {"request_rate": 0.0},
        {"base_url": "localhost:8000"},
    ):
        with pytest.raises(UsageError):
            ServingSettings(**wrong)  # type: ignore[arg-type]


# -- its parts -----------------------------------------------------------------------------------------------
def test_events_however_they_are_cut() -> None:
    wire = 'data: {"a": "é\\n"}\n\n: ping\ndata:[1]\r\n\r\nevent: x\ndata: [DONE]'.encode()
    whole = ['{"a": "é\\n"}'.encode(), b"[1]", b"[DONE]"]
    for size in range(1, len(wire) + 1):
        reader = EventReader()
        events = [event for at in range(0, len(wire), size) for event in reader.feed(wire[at : at + size])]
        assert events + reader.close() == whole


def test_arrivals() -> None:
    assert arrivals(3, math.inf, 1.0, 0) == [0.0] * 3
    assert arrivals(4, 2.0, math.inf, 0) == pytest.approx([0.5, 1.0, 1.5, 2.0])

    def unevenness(burstiness: float) -> float:
        times = arrivals(500, 10.0, burstiness, seed=1)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(50.0)
        gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
        return statistics.stdev(gaps) / statistics.mean(gaps)

    # The coefficient of variation of a gamma distribution is 1/√shape.
    for burstiness in (0.25, 1.0, 25.0):
        assert unevenness(burstiness) == pytest.approx(burstiness**-0.5, rel=0.2)
    assert arrivals(5, 1.0, 1.0, 1) == arrivals(5, 1.0, 1.0, 1) != arrivals(5, 1.0, 1.0, 2)


def test_requests_are_paced(fake: Fake) -> None:
    found = measured(fake, num_prompts=5, request_rate=50.0)
    assert found["start_times"] == sorted(found["start_times"])
    assert found["duration"] >= 5 / 50.0, "the last is due then"


def test_the_arithmetic_of_the_report() -> None:
    outcomes = [
        Outcome(10.0, first=0.5, gaps=[0.1, 0.3], latency=0.9, prompt_tokens=4, output_tokens=5, queued=1.0),
        Outcome(10.2, first=1.5, gaps=[], latency=1.5, prompt_tokens=6, output_tokens=1),
        Outcome(11.0, prompt_tokens=9, failure=Failure("HTTP 500", "oh")),
    ]
    goals = {"ttft": 1500.0, "tpot": 99.0}
    metrics = ("ttft", "tpot", "itl", "e2el", "e2el_including_client_queue")
    found = report(outcomes, 2.0, metrics=metrics, percentiles=(75.0,), goodput=goals)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (10, 6)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1, 3, 8)
    assert (found["mean_ttft_ms"], found["std_ttft_ms"], found["p75_ttft_ms"]) == pytest.approx((1000, 500, 1250))
    assert found["mean_tpot_ms"] == pytest.approx(100), "only an answer of several tokens has one"
    assert (found["median_itl_ms"], found["mean_e2el_ms"]) == pytest.approx((200, 1200))
    assert found["mean_e2el_including_client_queue_ms"] == pytest.approx(1700)
    assert found["request_goodput"] == 0.5, "the first misses its tpot"
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (3, 2)
    assert details(outcomes)["errors"] == ["", "", "HTTP 500: oh"]


# -- prompts -------------------------------------------------------------------------------------------------
class Letters:
    """A tokenizer that knows no words."""

    async def count(self, text: str) -> int:
        return len(text) + 1


def text_of(counter: Counter, tokens: int, seed: int = 0) -> tuple[str, int]:
    return asyncio.run(random_text(counter, tokens, random.Random(seed)))


def test_random_texts_have_exact_lengths(demo_gguf: Path) -> None:
    demo = LocalTokenizer(str(demo_gguf))
    counters: list[Counter] = [Letters(), demo]
    for counter, tokens, seed in itertools.product(counters, (2, 3, 17, 256), range(3)):
        text, count = text_of(counter, tokens, seed)
        assert count == tokens == asyncio.run(counter.count(text))
    assert text_of(demo, 64, 1) != text_of(demo, 64, 2)
    assert text_of(Letters(), 1)[1] == 2, "one token for the beginning, and the least text"


def drawn(dataset: Dataset, count: int, *, seed: int = 0, chat: bool = False, counter: Counter | None = None) -> Any:
    return asyncio.run(samples(dataset, count, seed, counter, chat=chat))


def test_random_lengths_within_their_range() -> None:
    dataset = Dataset(input_len=10, output_len=20, range_ratio=0.3)
    found = drawn(dataset, 200)
    assert {len(sample.prompt.split()) for sample in found} == set(range(7, 14))
    assert {sample.output_tokens for sample in found} == set(range(14, 27))
    assert found == drawn(dataset, 200) != drawn(dataset, 200, seed=1)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_tokens": 7}\n')
    found = drawn(Dataset(name="custom", path=file), 5)
    assert len(found) == 5
    assert {(sample.prompt, sample.output_tokens) for sample in found} == {("one", 256), ("two", 7)}
    assert {sample.output_tokens for sample in drawn(Dataset(name="custom", path=file, output_len=3), 2)} == {3}

    file.write_text('{"prompt": [{"role": "user", "content": "hi"}]}')
    assert drawn(Dataset(name="custom", path=file), 1, chat=True)[0].prompt == [{"role": "user", "content": "hi"}]
    for content in (file.read_text(), "no JSON", '{"text": "x"}', '{"prompt": "x", "output_tokens": 0}', ""):
        file.write_text(content)
        with pytest.raises(UsageError):
            drawn(Dataset(name="custom", path=file), 1)
    with pytest.raises(UsageError):
        drawn(Dataset(name="custom", path=tmp_path / "nowhere"), 1)


def test_conversations(tmp_path: Path) -> None:
    def talk(question: int, answer: int) -> dict[str, Any]:
        turns = ["q " * question, "a " * answer, "more"]
        return {"conversations": [{"from": "human", "value": turn} for turn in turns]}

    class Words:
        async def count(self, text: str) -> int:
            return len(text.split())

    file = tmp_path / "talks.json"
    talks = [talk(5, 6), talk(3, 50), talk(50, 3), talk(1025, 9), talk(1000, 1049), {"conversations": []}, {}]
    file.write_text(json.dumps(talks))
    dataset = Dataset(name="sharegpt", path=file)
    (only, again) = drawn(dataset, 2, counter=Words())
    assert only == again
    assert (only.prompt_tokens, only.output_tokens) == (5, 6)
    shorter = drawn(Dataset(name="sharegpt", path=file, output_len=1), 2, counter=Words())
    assert {sample.prompt_tokens for sample in shorter} <= {5, 50, 1000}
    file.write_text('[{"conversations": [1, 2]}]')
    with pytest.raises(UsageError, match="ShareGPT"):
        drawn(dataset, 1)
