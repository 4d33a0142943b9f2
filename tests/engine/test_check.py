"""What another thread may ask of an engine while it steps, and what ends all requests at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from miaotui.engine.params import SamplingParams, StructuredOutputs
from miaotui.errors import RequestError
from tests.engine.toys import finish, toy_engine

DIGITS = SamplingParams(temperature=0.0, max_tokens=8, structured_outputs=StructuredOutputs(regex="[0-9]{3}"))


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ([], SamplingParams(), "prompt"),
        ([999], SamplingParams(), "prompt"),
        ([1] * 512, SamplingParams(), "prompt"),
        ([1], SamplingParams(max_tokens=600), "max_tokens"),
        ([1], SamplingParams(logit_bias={999: 1.0}), "logit_bias"),
        ([1], SamplingParams(structured_outputs=StructuredOutputs(regex="(")), "structured_outputs"),
    ],
)
def test_check_refuses_what_add_request_would(prompt: list[int], params: SamplingParams, named: str) -> None:
    engine = toy_engine()
    for ask in (engine.check, engine.add_request):
        with pytest.raises(RequestError) as refused:
            ask(prompt, params)
        assert refused.value.param == named
    assert not engine.has_work


def test_languages_are_compiled_on_other_threads() -> None:
    engine = toy_engine(eos=(256,))
    with ThreadPoolExecutor(4) as threads:
        masks = [future.result() for future in [threads.submit(engine.check, [5], DIGITS) for _ in range(8)]]
    assert engine.check([5], SamplingParams()) is None
    asked = [engine.add_request([5], DIGITS, grammar=mask) for mask in masks]
    plain = engine.add_request([5], DIGITS)
    done = finish(engine)
    answers = {done[request].outputs[0].text for request in (*asked, plain)}
    assert len(answers) == 1
    assert answers.pop().isdigit()
    engine.close()


def test_cancel_all_leaves_nothing() -> None:
    engine = toy_engine(seqs=2)
    for i in range(5):
        engine.add_request([i] * 20, SamplingParams(max_tokens=50))
    engine.step()
    ended = engine.cancel_all()
    assert {output.outputs[0].finish_reason for output in ended} == {"abort"}
    assert len(ended) == 5
    assert not engine.has_work
    assert engine.stats.blocks_in_use == 0
    engine.check_integrity()
