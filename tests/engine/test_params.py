"""Every wrong value is refused by its name; every right one is taken."""

from __future__ import annotations

from typing import Any

import pytest

from miaotui.engine.params import BeamSearchParams, SamplingParams, StructuredOutputs
from miaotui.errors import RequestError

WRONG: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 1.5),
    ("n", True),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2.0),
    ("seed", "one"),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("stop", [""]),
    ("stop_token_ids", [-1]),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("logit_bias", {1: 101}),
    ("logit_bias", {"a": 1}),
    ("logprobs", -2),
    ("prompt_logprobs", 0.5),
    ("bad_words", [" "]),
    ("allowed_token_ids", []),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"), [("beam_width", 0), ("max_tokens", 0), ("n", 4), ("length_penalty", float("inf"))]
)
def test_wrong_beams_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        BeamSearchParams(**{"beam_width": 3, "max_tokens": 5, name: value})


def test_one_language_at_a_time() -> None:
    with pytest.raises(RequestError, match="json and regex"):
        StructuredOutputs(json={}, regex="a")
    with pytest.raises(RequestError, match="none of"):
        StructuredOutputs()
    with pytest.raises(RequestError, match="choice"):
        StructuredOutputs(choice=[])


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_plain_greedy_is_nothing_but_argmax() -> None:
    assert SamplingParams(temperature=0.0, stop="x", top_k=5, seed=1).plain_greedy
    assert not SamplingParams().plain_greedy
    for extra in ({"logprobs": 0}, {"min_tokens": 1}, {"bad_words": ["a"]}, {"presence_penalty": 0.1}):
        assert not SamplingParams(temperature=0.0, **extra).plain_greedy  # type: ignore[arg-type]


def test_stops_are_a_tuple_however_given() -> None:
    assert SamplingParams(stop="end").stops == ("end",)
    assert SamplingParams(stop=["a", "b"]).stops == ("a", "b")
    assert SamplingParams().stops == ()
