"""Several greedy steps in one call: the same answers, ended where they end, and no longer than others can wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from miaotui import LLM, SamplingParams
from miaotui.engine.engine import MOST_STEPS, Engine
from miaotui.engine.request import RequestOutput
from tests.engine.toys import finish, naive_greedy, toy_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, it is thought to be quick."""
    monkeypatch.setattr("miaotui.engine.engine._AT_ONCE", 60.0)


def calls(engine: Engine) -> list[int]:
    """Notes how many steps each further call to run on takes."""
    noted: list[int] = []
    run_on = engine.executor.run_on

    def note(*arguments: object) -> object:
        chosen = run_on(*arguments)  # type: ignore[arg-type]
        noted.append(len(chosen))
        return chosen

    engine.executor.run_on = note  # type: ignore[method-assign,assignment]
    return noted


def only(outputs: dict[str, RequestOutput]) -> RequestOutput:
    (output,) = outputs.values()
    return output


def test_an_answer_takes_few_calls() -> None:
    engine = toy_engine()
    noted = calls(engine)
    engine.add_request([1, 2, 3], GREEDY)
    assert only(finish(engine)).outputs[0].token_ids == naive_greedy([1, 2, 3], 60)
    assert noted == [MOST_STEPS] * 3 + [11]  # behind the prompt's step
    assert engine.stats.steps == engine.stats.generated_tokens == 60
    assert engine.stats.step_tokens == 62


def test_many_sequences_go_on_together_until_one_ends() -> None:
    engine = toy_engine()
    noted = calls(engine)
    lengths = {engine.add_request([i], SamplingParams(temperature=0.0, max_tokens=10 + 7 * i)): i for i in range(4)}
    done = finish(engine)
    for request, i in lengths.items():
        assert done[request].outputs[0].token_ids == naive_greedy([i], 10 + 7 * i)
    assert noted == [9, 7, 7, 7]


def test_an_end_token_ends_the_run() -> None:
    plain = naive_greedy([1, 2, 3], 60)
    engine = toy_engine(eos=(plain[7],))
    noted = calls(engine)
    engine.add_request([1, 2, 3], GREEDY)
    output = only(finish(engine)).outputs[0]
    assert (output.token_ids, output.finish_reason) == (plain[:8], "stop")
    assert noted == [7]


def test_what_follows_a_stop_string_is_forgotten() -> None:
    engine = toy_engine()
    engine.add_request("hello", GREEDY)
    text = only(finish(engine)).outputs[0].text
    stop = text[9:11]
    other = engine.add_request([5], GREEDY)
    stopped = engine.add_request("hello", SamplingParams(temperature=0.0, max_tokens=60, stop=[stop]))
    done = finish(engine)
    assert done[stopped].outputs[0].text == text[: text.index(stop)]
    assert done[stopped].outputs[0].finish_reason == "stop"
    assert done[other].outputs[0].token_ids == naive_greedy([5], 60)
    assert engine.stats.blocks_in_use == 0


def test_whoever_comes_is_taken_in_with_the_next_step() -> None:
    engine = toy_engine()
    noted = calls(engine)
    first = engine.add_request([1], GREEDY)
    for _ in range(3):
        engine.step()
    second = engine.add_request([2], GREEDY)
    before = len(noted)
    engine.step()
    assert len(noted) == before
    assert engine.stats.running == 2
    done = finish(engine)
    assert done[first].outputs[0].token_ids == naive_greedy([1], 60)
    assert done[second].outputs[0].token_ids == naive_greedy([2], 60)


@pytest.mark.parametrize(
    "beside",
    [
        SamplingParams(seed=1, max_tokens=60),
        SamplingParams(temperature=0.0, logprobs=2, max_tokens=60),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=60),
    ],
)
def test_one_that_wants_more_than_the_greatest_holds_all_to_single_steps(beside: SamplingParams) -> None:
    engine = toy_engine()
    noted = calls(engine)
    greedy = engine.add_request([1], SamplingParams(temperature=0.0, max_tokens=40))
    engine.add_request([2], beside)
    assert finish(engine)[greedy].outputs[0].token_ids == naive_greedy([1], 40)
    assert noted == []


def test_slow_steps_are_run_singly() -> None:
    engine = toy_engine()
    noted = calls(engine)
    engine.add_request([1], GREEDY)
    engine.step()
    for pace, steps in ((25.0, [2]), (70.0, [2]), (25.0, [2, 2])):
        engine._pace = pace
        engine.step()
        assert noted == steps


def test_few_blocks_hold_it_to_single_steps() -> None:
    """Rather than pushing somebody out for what is not needed yet."""
    engine = toy_engine(blocks=8, prefix=False)
    names = [engine.add_request([i] * 30, SamplingParams(temperature=0.0, max_tokens=34)) for i in range(2)]
    done = finish(engine)
    assert engine.stats.preemptions == 0
    for i, name in enumerate(names):
        assert done[name].outputs[0].token_ids == naive_greedy([i] * 30, 34)


@pytest.mark.parametrize(
    "options", [{}, {"compute": "fp32"}, {"kv_cache_dtype": "int8"}, {"greedy_screen": False}, {"device": "reference"}]
)
def test_backends_run_on_to_the_same_answers(demo_gguf: Path, options: dict[str, object]) -> None:
    """As step by step."""
    llm = LLM(str(demo_gguf), max_model_len=128, enable_prefix_caching=False, **options)  # type: ignore[arg-type]
    noted = calls(llm.engine)
    prompts = [list(range(5, 45)), [7, 8, 9], [100, 200]]
    for asked in (prompts[:1], prompts):
        params = SamplingParams(temperature=0.0, max_tokens=20)

        def tokens(asked: list[list[int]] = asked, params: SamplingParams = params) -> list[list[int]]:
            return [list(output.outputs[0].token_ids) for output in llm.generate(asked, params)]

        llm.engine.executor.runs_on = True
        quick = tokens()
        assert max(noted) == MOST_STEPS
        llm.engine.executor.runs_on = False
        noted.clear()
        assert tokens() == quick
        assert noted == []
