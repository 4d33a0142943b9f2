"""Tools in chat completions, as the official client sees them. The demo model calls what the grammar has it call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.serve.serving import MODEL, Server

QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Köln?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Köln", "São Paulo", '"x"\n']},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
ASKED: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "tools": [WEATHER], "max_tokens": 100}
REQUIRED: dict[str, Any] = {**ASKED, "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def only_call(answer: Any) -> tuple[str, dict[str, Any]]:
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.id[:5]) == ("function", "call_")
    return call.function.name, json.loads(call.function.arguments)


def check_weather(name: str, arguments: dict[str, Any]) -> None:
    assert name == "get_weather"
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Köln", "São Paulo", '"x"\n')
    assert 1 <= arguments["days"] <= 9


def streamed(chunks: list[Any]) -> tuple[str, list[list[str]], list[str | None]]:
    """Text, name and arguments of each call, and finish reasons, from a stream."""
    text, calls, ends = "", list[list[str]](), list[str | None]()
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            ends.append(choice.finish_reason)
            for part in choice.delta.tool_calls or []:
                if part.id is not None:
                    assert part.index == len(calls)
                    assert part.type == "function"
                    calls.append([part.function.name, ""])
                calls[part.index][1] += part.function.arguments
    return text, calls, ends


def test_a_required_call_fits_its_schema(client: OpenAI) -> None:
    check_weather(*only_call(client.chat.completions.create(**REQUIRED)))
    hot = client.chat.completions.create(**{**REQUIRED, "temperature": 1.5, "seed": 7, "n": 3})
    for choice in hot.choices:
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        check_weather(call.function.name, json.loads(call.function.arguments))


def test_a_stream_of_a_required_call_adds_up_to_the_answer(client: OpenAI) -> None:
    name, arguments = only_call(client.chat.completions.create(**REQUIRED))
    chunks = list(client.chat.completions.create(**REQUIRED, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text, calls, ends = streamed(chunks)
    assert text == ""
    assert [(n, json.loads(a)) for n, a in calls] == [(name, arguments)]
    assert ends == [None] * (len(ends) - 1) + ["tool_calls"]
    pieces = [c for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert len(pieces) > 5, "the arguments came in pieces"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > len(pieces)


def test_a_named_function_is_the_one_that_is_called(client: OpenAI) -> None:
    tools = [WEATHER, CLOCK]
    named = {"type": "function", "function": {"name": "clock"}}
    answer = client.chat.completions.create(**{**ASKED, "tools": tools, "tool_choice": named, "max_tokens": 200})
    (choice,) = answer.choices
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "clock"
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    choice_of_one = {"type": "allowed_tools", "allowed_tools": allowed}
    check_weather(
        *only_call(
            client.chat.completions.create(
                **{**ASKED, "tools": tools, "tool_choice": choice_of_one, "parallel_tool_calls": False}
            )
        )
    )


def test_several_calls(client: OpenAI) -> None:
    """The model does not know when to stop, so that it is cut; what it has called until then is whole."""
    answer = client.chat.completions.create(**{**ASKED, "tool_choice": "required", "max_tokens": 150})
    (choice,) = answer.choices
    assert choice.message.tool_calls is not None
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)
    whole = choice.message.tool_calls if choice.finish_reason == "tool_calls" else choice.message.tool_calls[:-1]
    assert whole
    for call in whole:
        assert call.type == "function"
        check_weather(call.function.name, json.loads(call.function.arguments))


def test_a_call_that_is_cut_short_is_said_to_be(client: OpenAI) -> None:
    answer = client.chat.completions.create(**{**REQUIRED, "max_tokens": 24})
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    whole = client.chat.completions.create(**REQUIRED).choices[0].message.tool_calls
    assert choice.message.tool_calls is not None
    assert whole is not None
    assert choice.message.tool_calls[0].type == whole[0].type == "function"
    assert whole[0].function.arguments.startswith(choice.message.tool_calls[0].function.arguments)


def test_where_calls_are_the_model_s_choice_it_may_talk(client: OpenAI) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    for more in ({}, {"tool_choice": "auto"}, {"tools": [strict]}, {"parallel_tool_calls": False}):
        answer = client.chat.completions.create(**{**ASKED, "max_tokens": 16, **more})
        assert answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None
        text, calls, ends = streamed(
            list(client.chat.completions.create(**{**ASKED, "max_tokens": 16, **more}, stream=True))
        )
        assert (text, calls, ends[-1]) == (answer.choices[0].message.content, [], "length")


def test_with_none_the_model_does_not_know_of_the_tools(client: OpenAI) -> None:
    without = {key: value for key, value in ASKED.items() if key != "tools"}
    plain = client.chat.completions.create(**{**without, "max_tokens": 8})
    none = client.chat.completions.create(**{**ASKED, "max_tokens": 8, "tool_choice": "none"})
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage is not None
    assert plain.usage is not None
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    shown = client.chat.completions.create(**{**ASKED, "max_tokens": 1})
    assert shown.usage is not None
    assert shown.usage.prompt_tokens > plain.usage.prompt_tokens + 50


def test_a_result_goes_back_to_the_model(client: OpenAI) -> None:
    first = client.chat.completions.create(**REQUIRED)
    message = first.choices[0].message
    assert message.tool_calls is not None
    result: dict[str, Any] = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    talk: list[Any] = [*QUESTION, message, result]
    answer = client.chat.completions.create(model=MODEL, messages=talk, tools=[WEATHER], max_tokens=8)  # type: ignore[list-item]
    assert first.usage is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens + 20
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens


def test_the_client_s_own_parsing(client: OpenAI) -> None:
    class Weather(BaseModel):
        city: Literal["Köln", "Bonn"]
        days: Literal[1, 2, 3]

    answer = client.chat.completions.parse(
        model=MODEL,
        messages=QUESTION,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0].function.parsed_arguments, Weather)
    with client.chat.completions.stream(**REQUIRED) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in events
    assert events.count("tool_calls.function.arguments.done") == 1
    assert final.choices[0].finish_reason == "tool_calls"


def test_the_asynchronous_client(server: Server) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def stream() -> list[Any]:
                return [chunk async for chunk in await client.chat.completions.create(**REQUIRED, stream=True)]

            whole, *streams = await asyncio.gather(
                client.chat.completions.create(**REQUIRED), *(stream() for _ in "ab")
            )
            call = only_call(whole)
            check_weather(*call)
            for chunks in streams:
                text, calls, _ = streamed(chunks)
                assert (text, [(name, json.loads(arguments)) for name, arguments in calls]) == ("", [call])

    asyncio.run(main())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tools"),
    ({"structured_outputs": {"regex": "a"}}, "tools"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
    ({"functions": []}, "functions"),
]


@pytest.mark.parametrize(("more", "param"), REFUSED)
def test_what_cannot_be_is_refused_by_name(server: Server, more: dict[str, Any], param: str) -> None:
    status, named, _ = server.error("/v1/chat/completions", {**ASKED, **more})
    assert (status, named and named.split(".custom.")[0]) == (400, param)


def test_a_schema_that_cannot_be_held_to_is_the_tools_fault(server: Server) -> None:
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "$ref": "#/nowhere"}}}
    status, _, answer = server.post("/v1/chat/completions", {**REQUIRED, "tools": [broken]})
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert "structured_outputs" not in answer["error"]["message"]


def test_an_answer_in_json_beside_tools(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    format_: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(**ASKED, response_format=format_)
    message = answer.choices[0].message
    assert message.tool_calls or isinstance(json.loads(message.content or "")["ok"], bool)
