"""Greedy output is the naive loop's, whatever the batch, the chunks, the pressure and the prefixes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from miaotui.engine.engine import MOST_STEPS
from miaotui.engine.params import SamplingParams
from miaotui.errors import RequestError
from tests.engine.toys import EOS, finish, naive_greedy, toy_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(48)]
    made = []
    for _ in range(count):
        own = [rng.randrange(256) for _ in range(rng.randrange(1, longest))]
        made.append(shared[: rng.randrange(49)] + own)
    return made


@pytest.mark.parametrize("budget", [1, 37, 512])
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("blocks", [14, 256])
def test_greedy_is_the_naive_loop(budget: int, batch: int, blocks: int) -> None:
    engine = toy_engine(budget=budget, seqs=batch, blocks=blocks)
    asked = prompts(batch if budget > 1 else min(batch, 6), seed=batch)
    ids = [engine.add_request(prompt, GREEDY) for prompt in asked]
    done = finish(engine, check=budget > 1)
    for request_id, prompt in zip(ids, asked, strict=True):
        assert done[request_id].outputs[0].token_ids == naive_greedy(prompt, 24)
        assert done[request_id].outputs[0].finish_reason == "length"
    if blocks == 14 and batch == 40 and budget == 512:
        assert engine.stats.preemptions > 0
    assert engine.stats.blocks_in_use == 0


@pytest.mark.parametrize("prefix", [True, False])
def test_a_prefix_is_run_once(prefix: bool) -> None:
    engine = toy_engine(prefix=prefix)
    prompt = list(range(100))
    first = engine.add_request(prompt, GREEDY, arrival_time=12.5)
    output = finish(engine)[first]
    assert (output.num_cached_tokens, output.metrics.arrival_time) == (0, 12.5)
    again = engine.add_request(prompt[:97], GREEDY)
    output = finish(engine)[again]
    assert output.num_cached_tokens == (96 if prefix else 0)
    assert output.outputs[0].token_ids == naive_greedy(prompt[:97], 24)
    longer = engine.add_request(prompt + naive_greedy(prompt, 24), GREEDY)
    output = finish(engine)[longer]
    assert output.num_cached_tokens == (112 if prefix else 0)
    assert output.outputs[0].token_ids == naive_greedy(output.prompt_token_ids, 24)
    stats = engine.stats
    assert stats.prefix_hits == (96 + 112 if prefix else 0)
    assert stats.prompt_tokens == 100 + 97 + 124
    assert stats.step_tokens == stats.prompt_tokens - stats.prefix_hits + 3 * 23, "the last token is not run"


@pytest.mark.parametrize("wanted", [{}, {"logprobs": 1}, {"temperature": 1.0}, {"logit_bias": {3: 9.0}}])
def test_a_step_is_greedy_where_nothing_else_is_wanted(wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its logits may be anything: the toy's are. One that wants more makes the whole step compute them."""
    engine = toy_engine()
    steps: list[bool] = []
    run = engine.executor.run
    monkeypatch.setattr(engine.executor, "run", lambda step: (steps.append(step.greedy), run(step))[1])
    engine.add_request([1, 2, 3], GREEDY)
    engine.add_request([4, 5, 6], SamplingParams(**{"temperature": 0.0, "max_tokens": 5, **wanted}))
    finish(engine)
    assert steps == [not wanted] * 5 + [True] * 19


def test_the_last_token_is_always_run() -> None:
    engine = toy_engine()
    prompt = list(range(64))
    engine.add_request(prompt, GREEDY)
    finish(engine)
    again = engine.add_request(prompt, GREEDY)
    output = finish(engine)[again]
    assert output.num_cached_tokens == 48
    assert output.outputs[0].token_ids == naive_greedy(prompt, 24)


def test_urgent_requests_go_first_and_push_others_out() -> None:
    engine = toy_engine(seqs=2, blocks=12)
    long = SamplingParams(temperature=0.0, max_tokens=60)
    slow = [engine.add_request(list(range(i, i + 40)), long, priority=5) for i in range(2)]
    for _ in range(3):
        engine.step()
    urgent = engine.add_request(list(range(50, 110)), GREEDY, priority=-1)
    order = list(finish(engine))
    assert order[0] == urgent
    assert sorted(order[1:]) == slow
    assert engine.stats.preemptions > 0


def test_priorities_order_what_waits() -> None:
    engine = toy_engine(seqs=1)
    names = [engine.add_request([i, i + 1], GREEDY, priority=p) for i, p in enumerate([3, 1, 2, 1])]
    assert list(finish(engine)) == [names[i] for i in (1, 3, 2, 0)]


def test_cancelled_requests_leave_nothing_behind() -> None:
    engine = toy_engine(seqs=2)
    running, other, waiting = (engine.add_request([7, i], GREEDY) for i in range(3))
    for _ in range(4):
        engine.step()
    output = engine.cancel(running)
    assert output is not None
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].token_ids == naive_greedy([7, 0], 4)
    engine.check_integrity()
    assert engine.cancel(waiting) is not None
    assert engine.cancel("unknown") is None
    engine.check_integrity()
    assert list(finish(engine)) == [other]
    assert engine.stats.finished == {"stop": 0, "length": 1, "abort": 2}


@pytest.mark.parametrize("runs_on", [False, True])
def test_a_stream_adds_up_to_the_whole(runs_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miaotui.engine.engine._AT_ONCE", 60.0)
    engine = toy_engine(eos=(EOS,), runs_on=runs_on)
    whole_id = engine.add_request("hello", GREEDY)
    whole = finish(engine)[whole_id].outputs[0]
    stream_id = engine.add_request("hello", GREEDY, stream=True)
    text, tokens, steps = "", [], 0
    while engine.has_work:
        for output in engine.step():
            assert output.request_id == stream_id
            text += output.outputs[0].text
            tokens += output.outputs[0].token_ids
            steps += 1
    assert (text, tokens) == (whole.text, whole.token_ids)
    assert steps == (len(tokens) if not runs_on else 1 + -(-(len(tokens) - 1) // MOST_STEPS))


def test_the_end_token_ends_and_is_not_shown() -> None:
    prompt = [1, 2, 3]
    plain = naive_greedy(prompt, 24)
    engine = toy_engine(eos=(plain[5],))
    first = finish(engine, check=True) if engine.has_work else {}
    assert first == {}
    stopped = engine.add_request(prompt, GREEDY)
    ignored = engine.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
    done = finish(engine)
    end = plain.index(plain[5]) + 1
    assert done[stopped].outputs[0].token_ids == plain[:end]
    assert done[stopped].outputs[0].finish_reason == "stop"
    assert done[stopped].outputs[0].stop_reason is None
    assert done[stopped].outputs[0].text == engine.tokenizer.decode(plain[: end - 1])
    assert done[ignored].outputs[0].token_ids == plain


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_wherever_it_is_cut(stream: bool, include: bool) -> None:
    engine = toy_engine()
    first = engine.add_request("say", SamplingParams(temperature=0.0, max_tokens=60))
    full = finish(engine)[first].outputs[0].text
    stop = next(full[i : i + 2] for i in range(10, 50) if full[i : i + 2].isascii())
    params = SamplingParams(temperature=0.0, max_tokens=60, stop=["never", stop], include_stop_str_in_output=include)
    request = engine.add_request("say", params, stream=stream)
    text, last = "", None
    while engine.has_work:
        for output in engine.step():
            last = output.outputs[0]
            text += last.text
    assert text == full[: full.index(stop) + (len(stop) if include else 0)]
    assert last is not None
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert request is not None


def test_stop_token_ids_and_min_tokens() -> None:
    prompt = [9, 8, 7]
    plain = naive_greedy(prompt, 24)
    engine = toy_engine()
    stop = engine.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[plain[3]]))
    output = finish(engine)[stop].outputs[0]
    assert output.token_ids == plain[: plain.index(plain[3]) + 1]
    assert output.stop_reason == plain[3]
    least = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[plain[3]], min_tokens=10)
    later = finish_one(engine, prompt, least)
    assert len(later) >= 10
    assert plain[3] not in later[:10]


def finish_one(engine, prompt, params):  # type: ignore[no-untyped-def]
    request = engine.add_request(prompt, params)
    return finish(engine)[request].outputs[0].token_ids


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = toy_engine(blocks=4, max_model_len=512)
    with pytest.raises(RequestError, match=r"needs 76 positions \(60 prompt tokens and 16 new ones\).* holds 65"):
        engine.add_request([1] * 60, SamplingParams())
    with pytest.raises(RequestError, match="80 prompt tokens"):
        engine.add_request([1] * 80, SamplingParams(max_tokens=None))
    with pytest.raises(RequestError, match="token 999"):
        engine.add_request([999], SamplingParams())
    with pytest.raises(RequestError, match="empty"):
        engine.add_request([], SamplingParams())
    with pytest.raises(RequestError, match="logit_bias names token 4000"):
        engine.add_request([1], SamplingParams(logit_bias={4000: 1.0}))
    assert not engine.has_work
    exact = engine.add_request([1] * 49, SamplingParams(temperature=0.0))
    assert len(finish(engine)[exact].outputs[0].token_ids) == 16


def test_without_max_tokens_a_request_has_all_that_fits() -> None:
    engine = toy_engine(blocks=3, max_model_len=512)
    request = engine.add_request([1] * 20, SamplingParams(temperature=0.0, max_tokens=None))
    assert finish(engine)[request].outputs[0].token_ids == naive_greedy([1] * 20, 29)
