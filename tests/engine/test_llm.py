"""The public API over a toy model: prompts of every form, order, streams, chats, memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import miaotui.hardware.detect
import miaotui.model.build
from miaotui import LLM, BeamSearchParams, SamplingParams
from miaotui.backends.ops import StepShape
from miaotui.engine.memory import fit_cache
from miaotui.errors import RequestError, ResourceError, UsageError
from tests.engine.toys import EOS, ToyExecutor, naive_greedy, toy_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@dataclass
class ToySpec:
    eos_token_ids: tuple[int, ...] = (EOS,)


class ToyTemplate:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, messages: Any, tools: Any = None, **template: Any) -> list[int]:
        said = "".join(f"{m['role']}:{m['content']};" for m in messages)
        return self._tokenizer.encode(f"{said}{len(tools or ())}{sorted(template)}")


class ToyCheckpoint:
    path = Path("toy")

    def fingerprint(self) -> str:
        return "toy"


@dataclass
class ToyLoaded:
    spec: Any
    tokenizer: Any
    executor: Any
    chat_template: Any
    checkpoint: Any


@pytest.fixture
def toy_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM("toy")` loads the toy, on a machine with little memory."""

    def load(model: str, **options: Any) -> ToyLoaded:
        seqs = options["max_num_seqs"]
        rows = options.get("max_logits_rows") or seqs
        shape = StepShape(options["max_num_batched_tokens"], seqs, rows, 256)
        tokenizer = toy_tokenizer()
        return ToyLoaded(ToySpec(), tokenizer, ToyExecutor(shape), ToyTemplate(tokenizer), ToyCheckpoint())

    monkeypatch.setattr(miaotui.model.build, "load", load)
    monkeypatch.setattr(miaotui.hardware.detect, "available_memory", lambda: 50_000)


@pytest.fixture
def llm(toy_model: None) -> Iterator[LLM]:
    with LLM("toy", max_num_seqs=4, max_num_batched_tokens=64) as made:
        yield made
    assert made.engine.executor.closed  # type: ignore[attr-defined]


def test_prompts_of_every_form(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    prompts: list[Any] = ["hello", ids, {"prompt_token_ids": ids}, {"prompt": "hello"}, tuple(ids)]
    wanted = naive_greedy(ids, 12)
    for output in (*llm.generate(prompts, GREEDY), *(llm.generate(p, GREEDY)[0] for p in prompts)):
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == wanted
        assert output.finished
    for wrong in ({"text": "x"}, {"prompt_token_ids": ["a"]}):
        with pytest.raises(RequestError, match="token ids"):
            llm.generate(wrong, GREEDY)  # type: ignore[arg-type]


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    prompts = [[i, i + 1] for i in range(40)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + i % 9) for i in range(40)]
    outputs = llm.generate(prompts, params, priority=[i % 3 for i in range(40)])
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1 + i % 9 for i in range(40)]
    assert llm.generate([], GREEDY) == []
    with pytest.raises(RequestError, match="2 params for 3 prompts"):
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])


def test_a_refused_prompt_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(RequestError, match="positions"):
        llm.generate([[1], [2], [3] * 300], GREEDY)
    assert not llm.engine.has_work
    llm.engine.check_integrity()
    assert llm.generate([1], GREEDY)[0].finished


def test_streams_interleave_and_can_be_closed(llm: LLM) -> None:
    first, second = llm.stream([1, 2], GREEDY), llm.stream([3, 4], GREEDY)
    tokens: list[list[int]] = [[], []]
    for a, b in zip(first, second, strict=True):
        tokens[0] += a.outputs[0].token_ids
        tokens[1] += b.outputs[0].token_ids
    assert tokens == [naive_greedy([1, 2], 12), naive_greedy([3, 4], 12)]
    third = llm.stream([5, 6], GREEDY)
    next(third)
    assert llm.generate([7, 8], GREEDY)[0].outputs[0].token_ids == naive_greedy([7, 8], 12)
    third.close()
    llm.stream([5, 6], GREEDY).close()
    assert not llm.engine.has_work
    llm.stream([5, 6], GREEDY)
    llm.generate([7, 8], GREEDY)
    assert not llm.engine.has_work
    with pytest.raises(RequestError):
        llm.stream([1] * 300, GREEDY)


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, tools=[{}], enable_thinking=False)
    assert bytes(llm.tokenizer.decode(output.prompt_token_ids), "utf-8") == b"user:hi;1['enable_thinking']"
    several = llm.chat([messages, messages], GREEDY)
    assert [o.outputs[0].token_ids for o in several] == [naive_greedy(several[0].prompt_token_ids, 12)] * 2
    streamed = [token for o in llm.stream_chat(messages, GREEDY) for token in o.outputs[0].token_ids]
    assert streamed == several[0].outputs[0].token_ids
    llm.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat(messages)


def test_beam_search_and_a_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    (output,) = llm.beam_search([1, 2], BeamSearchParams(3, 5))
    assert len(output.outputs) == 3
    llm.generate([[1], [2]], GREEDY, use_tqdm=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


def test_bounds_must_be_positive() -> None:
    with pytest.raises(UsageError, match="max_num_seqs is 0"):
        LLM("toy", max_num_seqs=0)
    with pytest.raises(UsageError, match="kv_cache_memory_bytes is -1"):
        LLM("toy", kv_cache_memory_bytes=-1)


def test_a_cache_of_a_given_size_forces_preemption(toy_model: None) -> None:
    with LLM("toy", kv_cache_memory_bytes=20 * 64, max_num_batched_tokens=64) as llm:
        prompts = [[i] * 30 for i in range(8)]
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40))
        assert [o.outputs[0].token_ids for o in outputs] == [naive_greedy(prompt, 40) for prompt in prompts]
        assert llm.engine.stats.blocks == 20
        assert llm.engine.stats.preemptions > 0


def test_prefixes_are_kept_in_a_file(toy_model: None, tmp_path: Path) -> None:
    prompt = list(range(70))
    for cached in (0, 64):
        with LLM("toy", prefix_cache_file=tmp_path / "p", prefix_cache_bytes=8192, max_model_len=128) as llm:
            (output,) = llm.generate(prompt, GREEDY)
            assert output.outputs[0].token_ids == naive_greedy(prompt, 12)
            assert output.num_cached_tokens == cached
    assert (tmp_path / "p").stat().st_size <= 8192
    with pytest.raises(UsageError, match="prefix_cache_file needs prefix caching"):
        LLM("toy", prefix_cache_file=tmp_path / "p", enable_prefix_caching=False)
    with pytest.raises(UsageError, match="no room for a block"):
        LLM("toy", prefix_cache_file=tmp_path / "p", prefix_cache_bytes=1)


def executor(context: int) -> ToyExecutor:
    return ToyExecutor(StepShape(8, 4, 4, context))


def test_the_cache_is_what_is_wanted_and_no_more_than_a_share() -> None:
    fit = fit_cache(executor(1000), 10**9, 1000, 4)
    assert (fit.blocks, fit.max_model_len) == (63 * 4, 1000)
    fit = fit_cache(executor(1000), 20_000, 1000, 4)
    assert (fit.blocks, fit.max_model_len) == (20_000 * 4 // 10 // 64, 1000)


def test_a_context_that_does_not_fit_is_shortened_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "miaotui"):
        fit = fit_cache(executor(10_000), 10_000, 10_000, 4)
    assert (fit.blocks, fit.max_model_len) == (62, 992)
    assert "max_model_len is 992 instead of 10000" in caplog.text


def test_too_little_memory_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ResourceError, match="room for 96 positions"):
        fit_cache(executor(10_000), 1_000, 10_000, 4)
    assert fit_cache(executor(64), 1_000, 64, 4).max_model_len == 64


def test_a_cache_of_a_given_size() -> None:
    fit = fit_cache(executor(1000), 10**9, 1000, 4, 64_000)
    assert (fit.blocks, fit.max_model_len) == (1000, 1000)
    assert fit_cache(executor(10_000), 10**9, 10_000, 4, 6_400).max_model_len == 1600
    with pytest.raises(ResourceError, match=r"0 MB are given to it.*Raise kv_cache_memory_bytes"):
        fit_cache(executor(10_000), 10**9, 10_000, 4, 640)
    with pytest.raises(ResourceError, match=r"is to have 2000 MB, but 1000 MB"):
        fit_cache(executor(10_000), 10**9, 10_000, 4, 2 * 10**9)


def test_guessing_changes_no_answer(toy_model: None) -> None:
    prompts = [[i, 5, 6, 5, 6] for i in range(6)]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30)
    with LLM("toy", max_num_seqs=4) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    for speculative in ("ngram", {"model": "toy", "num_speculative_tokens": 3}, '{"model": "toy"}'):
        with LLM("toy", max_num_seqs=4, speculative=speculative) as llm:
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == wanted
            assert llm.engine.executor.shape.max_logits_rows >= 4
            proposer: Any = llm.engine._speculator._proposer  # type: ignore[union-attr]
        assert speculative == "ngram" or proposer._executor.closed
    with pytest.raises(UsageError, match="neither a method nor JSON"):
        LLM("toy", speculative="medusa")


def test_what_fails_while_assembling_is_closed_again(toy_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ToyExecutor] = []
    load = miaotui.model.build.load

    def noted(*names: Any, **options: Any) -> Any:
        loaded = load(*names, **options)
        made.append(loaded.executor)  # type: ignore[arg-type]
        return loaded

    monkeypatch.setattr(miaotui.model.build, "load", noted)
    with pytest.raises(ResourceError):
        LLM("toy", speculative={"model": "toy"}, kv_cache_memory_bytes=1)
    assert [executor.closed for executor in made] == [True, True]
