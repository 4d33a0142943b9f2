"""Penalties, biases, masks and lengths, each against the plainest loop that could compute it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from miaotui.engine.params import SamplingParams
from tests.engine.toys import EOS, VOCAB, finish, history_logits, naive_greedy, toy_engine

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def controlled(logits: list[float], params: SamplingParams, output: list[int], bad: list[list[int]]) -> list[float]:
    """One token at a time, as vLLM's documentation says it."""
    forbidden = set()
    if params.allowed_token_ids is not None:
        forbidden |= set(range(len(logits))) - set(params.allowed_token_ids)
    for word in bad:
        if len(output) >= len(word) - 1 and output[len(output) - len(word) + 1 :] == word[:-1]:
            forbidden.add(word[-1])
    if len(output) < params.min_tokens:
        forbidden |= {EOS, *(params.stop_token_ids or ())}
    counts = Counter(output)
    changed = []
    for token, logit in enumerate(logits):
        x = -np.inf if token in forbidden else logit
        x += (params.logit_bias or {}).get(token, 0.0)
        if token in counts or token in PROMPT:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * counts[token]
        x -= params.presence_penalty * (token in counts)
        changed.append(x)
    return changed


CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -1.5},
    {"presence_penalty": 1.9},
    {"presence_penalty": -0.4, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
    {"logit_bias": {7: 4.0, 200: 2.0, 9: -100.0}},
    {"allowed_token_ids": list(range(40, 60))},
    {"bad_words": ["a", "bc"], "allowed_token_ids": list(range(60, 75))},
    {"min_tokens": 12, "stop_token_ids": [10, 11, 12], "allowed_token_ids": [EOS, *range(8, 16)]},
    {"allowed_token_ids": list(range(30)), "frequency_penalty": 1.0, "logit_bias": {3: 5.0}, "min_tokens": 3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("blocks", [5, 64])
def test_greedy_under_control(case: dict[str, Any], blocks: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, **case)
    engine = toy_engine(eos=(EOS,), blocks=blocks, seqs=2)
    bad = [engine.tokenizer.encode(w) for word in params.bad_words or () for w in (word, " " + word)]
    other = engine.add_request([1], SamplingParams(temperature=0.0, max_tokens=60), priority=-1)
    request = engine.add_request(PROMPT, params)
    output = finish(engine)[request].outputs[0]
    wanted: list[int] = []
    while len(wanted) < 40:
        logits = history_logits(PROMPT + wanted).astype(np.float32)
        wanted.append(int(np.argmax(np.array(controlled(logits.tolist(), params, wanted, bad), np.float32))))
        if wanted[-1] in (EOS, *(params.stop_token_ids or ())):
            break
    assert output.token_ids == wanted
    assert other


def test_controls_do_not_touch_each_other() -> None:
    """Rows of one step keep to their own parameters, and a plain one is untouched."""
    engine = toy_engine()
    plain = engine.add_request(PROMPT, SamplingParams(temperature=0.0, max_tokens=10))
    banned = engine.add_request(PROMPT, SamplingParams(temperature=0.0, max_tokens=10, allowed_token_ids=[1, 2]))
    done = finish(engine)
    assert done[plain].outputs[0].token_ids == naive_greedy(PROMPT, 10)
    assert set(done[banned].outputs[0].token_ids) <= {1, 2}


def test_when_nothing_is_allowed_the_sequence_ends() -> None:
    engine = toy_engine()
    letter = engine.tokenizer.encode("a")
    params = SamplingParams(max_tokens=10, allowed_token_ids=letter, bad_words=["a"])
    for stream in (False, True):
        engine.add_request(PROMPT, params, stream=stream)
        (output,) = engine.step()
        assert output.finished
        assert output.outputs[0].token_ids == []
        assert output.outputs[0].text == ""
        assert output.outputs[0].finish_reason == "stop"


def test_min_tokens_gives_way_when_only_an_end_is_left() -> None:
    engine = toy_engine(eos=(EOS,))
    request = engine.add_request(PROMPT, SamplingParams(max_tokens=10, min_tokens=5, allowed_token_ids=[EOS]))
    assert finish(engine)[request].outputs[0].token_ids == [EOS]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_wait_for_min_tokens(stream: bool) -> None:
    engine = toy_engine()
    allowed = engine.tokenizer.encode("ab")
    params = SamplingParams(
        temperature=0.0, max_tokens=30, min_tokens=10, stop="a", allowed_token_ids=allowed, repetition_penalty=1.0
    )
    engine.add_request(PROMPT, params, stream=stream)
    text, tokens = "", []
    while engine.has_work:
        for output in engine.step():
            text += output.outputs[0].text
            tokens += output.outputs[0].token_ids
    assert len(tokens) > 10
    assert text == engine.tokenizer.decode(tokens[:-1])


@pytest.mark.parametrize("blocks", [6, 128])
@pytest.mark.parametrize("prompt_len", [5, 16, 31, 33])
@pytest.mark.parametrize("seqs", [2, 8])
def test_n_continuations_share_a_prompt(blocks: int, prompt_len: int, seqs: int) -> None:
    """Each equals the one that a request of its own with the same seed and index would have drawn."""
    prompt = list(range(prompt_len))
    params = SamplingParams(n=5, temperature=3.0, seed=3, max_tokens=20)
    engine = toy_engine(blocks=blocks, seqs=seqs)
    request = engine.add_request(prompt, params)
    output = finish(engine)[request]
    assert [o.index for o in output.outputs] == list(range(5))
    assert len({tuple(o.token_ids) for o in output.outputs}) == 5
    wide = toy_engine(prefix=False)
    again = wide.add_request(prompt, params)
    assert [o.token_ids for o in finish(wide)[again].outputs] == [o.token_ids for o in output.outputs]
    assert all(len(o.token_ids) == 20 for o in output.outputs)
    if seqs == 8 and blocks == 128:
        executor: Any = engine.executor
        assert executor.tokens_run == prompt_len + 5 * 19
        assert executor.copies == (4 if prompt_len % 16 else 0)


def test_n_greedy_continuations_read_their_own_copies() -> None:
    prompt = list(range(21))
    engine = toy_engine()
    request = engine.add_request(prompt, SamplingParams(n=3, temperature=0.0, max_tokens=40))
    assert all(o.token_ids == naive_greedy(prompt, 40) for o in finish(engine)[request].outputs)


def test_n_in_a_stream() -> None:
    engine = toy_engine()
    params = SamplingParams(n=3, temperature=3.0, seed=3, max_tokens=10, logprobs=0)
    first = engine.add_request([1], params)
    wanted = finish(engine)[first]
    engine.add_request([1], params, stream=True)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    texts = {0: "", 1: "", 2: ""}
    scored = 0
    while engine.has_work:
        for output in engine.step():
            for part in output.outputs:
                tokens[part.index] += part.token_ids
                texts[part.index] += part.text
                scored += len(part.logprobs or ())
    assert list(tokens.values()) == [o.token_ids for o in wanted.outputs]
    assert list(texts.values()) == [o.text for o in wanted.outputs]
    assert scored == 30


def test_ids_beyond_the_tokenizer_are_harmless() -> None:
    engine = toy_engine()
    request = engine.add_request([1], SamplingParams(max_tokens=4, allowed_token_ids=[VOCAB - 1]))
    output = finish(engine)[request].outputs[0]
    assert output.token_ids == [VOCAB - 1] * 4
    assert output.text == ""
