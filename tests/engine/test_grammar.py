"""Answers in a language: always in it, the likeliest in it when greedy, and refused when there is no such language."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from miaotui.engine.params import SamplingParams, StructuredOutputs
from miaotui.errors import RequestError
from tests.engine.toys import EOS, finish, history_logits, naive_greedy, toy_engine

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(temperature: float, stream: bool) -> None:
    engine = toy_engine(eos=(EOS,))
    outputs = StructuredOutputs(json=SCHEMA)
    for seed in range(6):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=200, structured_outputs=outputs)
        engine.add_request([seed], params, stream=stream)
        text = ""
        while engine.has_work:
            for output in engine.step():
                text += output.outputs[0].text
        answer = json.loads(text)
        assert set(answer) == {"name", "age"}
        assert len(answer["name"]) <= 5
        assert 0 <= answer["age"] <= 99


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        (StructuredOutputs(regex=r"[a-c]{3}-[0-9]{2,4}"), r"[a-c]{3}-[0-9]{2,4}"),
        (StructuredOutputs(choice=["yes", "no", "may.be"]), r"yes|no|may\.be"),
        (StructuredOutputs(choice=["a\n\t\\", 'say "é中"', "/x/ -"]), r'a\n\t\\|say "é中"|/x/ -'),
        (StructuredOutputs(grammar='start: "(" start ")" | "x"'), r"\(*x\)*"),
        (StructuredOutputs(json='{"type": "boolean"}'), r"true|false"),
    ],
)
def test_languages(outputs: StructuredOutputs, pattern: str) -> None:
    engine = toy_engine(eos=(EOS,), seqs=3, blocks=24)
    params = [SamplingParams(temperature=2.0, seed=i, max_tokens=60, structured_outputs=outputs, n=2) for i in range(5)]
    ids = [engine.add_request([i], p) for i, p in enumerate(params)]
    plain = engine.add_request([9, 9], SamplingParams(temperature=0.0, max_tokens=20))
    done = finish(engine)
    for request_id in ids:
        for output in done[request_id].outputs:
            if output.finish_reason == "stop":
                assert re.fullmatch(pattern, output.text)
    assert sum(o.finish_reason == "stop" for i in ids for o in done[i].outputs) >= 8
    assert done[plain].outputs[0].token_ids == naive_greedy([9, 9], 20)


def test_greedy_takes_the_likeliest_of_the_language() -> None:
    engine = toy_engine(eos=(EOS,))
    letters = engine.tokenizer.encode("abcdef")
    params = SamplingParams(temperature=0.0, max_tokens=12, structured_outputs=StructuredOutputs(regex="[a-f]{12}"))
    request = engine.add_request([1, 2], params)
    tokens = [1, 2]
    for _ in range(12):
        logits = history_logits(tokens)
        tokens.append(letters[int(np.argmax(logits[letters]))])
    assert finish(engine)[request].outputs[0].token_ids == tokens[2:]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_language_that_has_ended_ends_the_answer(ignore_eos: bool) -> None:
    engine = toy_engine(eos=(EOS,))
    params = SamplingParams(
        temperature=0.0, max_tokens=50, ignore_eos=ignore_eos, structured_outputs=StructuredOutputs(choice=["ab"])
    )
    request = engine.add_request([1, 2], params)
    output = finish(engine)[request].outputs[0]
    assert output.text == "ab"
    assert output.finish_reason == "stop"


def test_preemption_keeps_the_place_in_the_language() -> None:
    engine = toy_engine(eos=(EOS,), blocks=7, seqs=3)
    params = SamplingParams(temperature=0.0, max_tokens=40, structured_outputs=StructuredOutputs(regex="[a-f]{40}"))
    ids = [engine.add_request([i] * 20, params) for i in range(3)]
    done = finish(engine)
    assert engine.stats.preemptions > 0
    wide = toy_engine(eos=(EOS,))
    wanted = [wide.add_request([i] * 20, params) for i in range(3)]
    whole = finish(wide)
    assert [done[i].outputs[0].text for i in ids] == [whole[i].outputs[0].text for i in wanted]


@pytest.mark.parametrize(
    "outputs",
    [
        StructuredOutputs(json="{not json"),
        StructuredOutputs(json={"type": "no such type"}),
        StructuredOutputs(regex="(["),
        StructuredOutputs(grammar="start: nothing"),
    ],
)
def test_what_is_no_language_is_refused(outputs: StructuredOutputs) -> None:
    engine = toy_engine(eos=(EOS,))
    with pytest.raises(RequestError) as caught:
        engine.add_request([1], SamplingParams(structured_outputs=outputs))
    assert caught.value.param == "structured_outputs"
    assert not engine.has_work
    engine.check_integrity()
    engine.close()
