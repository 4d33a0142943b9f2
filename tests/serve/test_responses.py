"""Responses, as the official client sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from miaotui.serve.openai.errors import ApiError
from miaotui.serve.openai.response_events import GrowingResponse
from miaotui.serve.openai.response_items import conversation_of, instructed, with_output
from miaotui.serve.openai.response_schemas import ResponseRequest
from miaotui.serve.openai.response_store import ResponseStore, Stored
from miaotui.serve.openai.schemas import validate
from miaotui.serve.openai.tool_calls.deltas import CallArguments, CallBegins, Content
from tests.serve.serving import MODEL, Server

QUESTION = "What is gravity?"
GREEDY: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 16}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Köln", "São Paulo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALLING: dict[str, Any] = {
    **GREEDY,
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": 80,
}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: OpenAI, *messages: dict[str, Any], **more: Any) -> str:
    """What chat completions answer to the same."""
    listed: list[Any] = list(messages)
    answer = client.chat.completions.create(model=MODEL, messages=listed, temperature=0, max_tokens=16, **more)
    return answer.choices[0].message.content or ""


def of(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


# -- text --------------------------------------------------------------------------------------------------
def test_a_text_is_answered_as_in_a_chat(client: OpenAI) -> None:
    answer = client.responses.create(**GREEDY, metadata={"a": "b"}, instructions="Be brief.", user="me")
    assert answer.output_text == chat(client, of("system", "Be brief."), of("user", QUESTION))
    assert (answer.object, answer.model, answer.id[:5]) == ("response", MODEL, "resp_")
    assert (answer.metadata, answer.instructions, answer.user) == ({"a": "b"}, "Be brief.", "me")
    assert (answer.temperature, answer.top_p, answer.tools, answer.tool_choice) == (0, 1, [], "auto")
    (message,) = answer.output
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "incomplete")
    assert (answer.status, answer.error) == ("incomplete", None)
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 16
    assert answer.usage.total_tokens == 16 + answer.usage.input_tokens
    again = client.responses.create(**GREEDY, instructions="Be brief.")
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens == (answer.usage.input_tokens - 1) // 16 * 16
    ended = client.responses.create(**{**GREEDY, "max_output_tokens": 200}, extra_body={"stop": "."})
    assert (ended.status, ended.incomplete_details) == ("completed", None)
    assert ended.output[0].type == "message"
    assert ended.output[0].status == "completed"


def test_items_are_messages(client: OpenAI) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "I am Bob."}, {"type": "input_text", "text": "Hi!"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hello.", "annotations": []}],
        },
        {"type": "message", "role": "user", "content": "Who am I?"},
    ]
    told = [of("system", "Be brief."), of("user", "I am Bob.\nHi!"), of("assistant", "Hello."), of("user", "Who am I?")]
    assert client.responses.create(**{**GREEDY, "input": items}).output_text == chat(client, *told)
    more = client.responses.create(**{**GREEDY, "input": items}, instructions="Be kind.")
    told[0] = of("system", "Be kind.\n\nBe brief.")
    assert more.output_text == chat(client, *told)


EVENTS = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
ENDS = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def test_a_stream_tells_all_events_in_their_order(client: OpenAI) -> None:
    whole = client.responses.create(**GREEDY)
    events: list[Any] = list(client.responses.create(**GREEDY, stream=True))
    names = [event.type for event in events]
    deltas = names.count("response.output_text.delta")
    assert deltas > 8
    assert names == [*EVENTS, *["response.output_text.delta"] * deltas, *ENDS, "response.incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    (item,) = {e.item_id for e in events if hasattr(e, "item_id")}
    last = events[-1].response
    assert (last.output_text, last.output[0].id) == (whole.output_text, item)
    assert last.usage is not None
    assert whole.usage is not None
    assert (last.usage.output_tokens, last.usage.input_tokens) == (16, whole.usage.input_tokens)
    assert client.responses.retrieve(last.id).output_text == whole.output_text


def test_the_client_s_own_stream(client: OpenAI) -> None:
    ending = {**GREEDY, "max_output_tokens": 200, "extra_body": {"stop": "."}}
    with client.responses.stream(**ending) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == snapshots[-1]
    assert snapshots[-1] == client.responses.create(**ending).output_text
    with client.responses.stream(**CALLING) as stream:
        final = stream.get_final_response()
    assert final.output[0].type == "function_call"


def test_log_probabilities(client: OpenAI) -> None:
    include: list[Any] = ["message.output_text.logprobs"]
    answer = client.responses.create(**GREEDY, include=include, top_logprobs=2)
    message = answer.output[0]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == 16
    assert "".join(found.token for found in part.logprobs) == part.text
    assert all(len(found.top_logprobs) == 2 for found in part.logprobs)
    events: list[Any] = list(client.responses.create(**GREEDY, include=include, stream=True))
    told = [p for e in events if e.type == "response.output_text.delta" for p in e.logprobs]
    assert [p.token for p in told] == [p.token for p in part.logprobs]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**CALLING, top_logprobs=1)
    assert caught.value.param == "top_logprobs"


def test_answers_in_json(client: OpenAI) -> None:
    class Mood(BaseModel):
        mood: Literal["good", "bad"]

    answer = client.responses.parse(**GREEDY, text_format=Mood)
    assert isinstance(answer.output_parsed, Mood)
    assert answer.status == "completed"
    any_json = client.responses.create(**{**GREEDY, "max_output_tokens": 64}, text={"format": {"type": "json_object"}})
    assert any_json.output_text.startswith("{")


# -- tools -------------------------------------------------------------------------------------------------
def test_a_required_call(client: OpenAI) -> None:
    answer = client.responses.create(**CALLING)
    assert answer.status == "completed"
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, call.status) == ("get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Köln", "São Paulo")
    events: list[Any] = list(client.responses.create(**CALLING, stream=True))
    names = [event.type for event in events]
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    middle = ["response.function_call_arguments.delta"] * len(pieces)
    done = ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    assert names == [*EVENTS[:3], *middle, *done]
    assert len(pieces) > 2
    assert "".join(pieces) == call.arguments == events[-3].arguments
    assert events[2].item.arguments == ""
    assert events[-1].response.output[0].arguments == call.arguments
    named = client.responses.create(**{**CALLING, "tool_choice": {"type": "function", "name": "get_weather"}})
    assert named.output[0].type == "function_call"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    assert client.responses.create(**{**CALLING, "tool_choice": allowed}).output[0].type == "function_call"


def test_a_call_that_is_cut_short(client: OpenAI) -> None:
    answer = client.responses.create(**{**CALLING, "max_output_tokens": 19})
    (call,) = answer.output
    assert call.type == "function_call"
    assert (answer.status, call.status) == ("incomplete", "incomplete")
    goes_on = client.responses.create(**GREEDY, previous_response_id=answer.id)
    assert goes_on.output_text, "what is cut short is no part of the conversation"


def test_a_result_is_answered(client: OpenAI) -> None:
    first = client.responses.create(**CALLING)
    (call,) = first.output
    assert call.type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    by_id = client.responses.create(
        **{**GREEDY, "input": [result], "tools": [WEATHER], "tool_choice": "none"}, previous_response_id=first.id
    )
    whole: list[Any] = [{"role": "user", "content": QUESTION}, *first.output, result]
    by_items = client.responses.create(**{**GREEDY, "input": whole})
    assert by_id.output_text == by_items.output_text
    assert by_id.previous_response_id == first.id
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{**GREEDY, "input": [result]})
    assert caught.value.param == "input[0].call_id"


# -- kept --------------------------------------------------------------------------------------------------
def test_a_response_is_gone_on_from(client: OpenAI) -> None:
    first = client.responses.create(**GREEDY, instructions="Be brief.")
    second = client.responses.create(**{**GREEDY, "input": "And light?"}, previous_response_id=first.id)
    third = client.responses.create(**{**GREEDY, "input": "Why?"}, previous_response_id=second.id)
    talk = [of("user", QUESTION), of("assistant", first.output_text), of("user", "And light?")]
    assert second.output_text == chat(client, *talk), "instructions are not carried on"
    talk += [of("assistant", second.output_text), of("user", "Why?")]
    assert third.output_text == chat(client, *talk)
    fork = client.responses.create(**{**GREEDY, "input": "And light?"}, previous_response_id=first.id)
    assert fork.output_text == second.output_text


def test_a_response_is_asked_for_and_forgotten(client: OpenAI, server: Server) -> None:
    made = client.responses.create(**GREEDY)
    assert client.responses.retrieve(made.id) == made
    assert server.get(f"/v1/responses/{made.id}?stream=true")[2]["error"]["param"] == "stream"
    client.responses.delete(made.id)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**GREEDY, previous_response_id=made.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
    unkept = client.responses.create(**GREEDY, store=False)
    assert unkept.model_dump()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_the_store_is_bounded() -> None:
    def stored(name: str, size: int) -> Stored:
        return Stored({"id": name}, (), size)

    by_count = ResponseStore(most=3, most_bytes=1000)
    for name in "abcd":
        by_count.keep(stored(name, 1))
    assert [name for name in "abcd" if by_count.get(name)] == ["b", "c", "d"]
    by_bytes = ResponseStore(most=100, most_bytes=100)
    for name in "abc":
        by_bytes.keep(stored(name, 40))
    assert [name for name in "abc" if by_bytes.get(name)] == ["b", "c"]
    by_bytes.keep(stored("huge", 101))
    assert by_bytes.get("huge") is None
    assert by_bytes.get("c") is not None
    assert by_bytes.forget("b")
    assert not by_bytes.forget("b")
    by_bytes.keep(stored("d", 60))
    assert [name for name in "abcd" if by_bytes.get(name)] == ["c", "d"]


def test_the_store_among_threads() -> None:
    store = ResponseStore(most=10, most_bytes=1 << 20)

    def work(worker: int) -> None:
        for i in range(300):
            store.keep(Stored({"id": f"{worker}-{i}"}, (), 10))
            store.get(f"{worker}-{i - 3}")
            store.forget(f"{worker}-{i - 5}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert store._bytes == 10 * len(store._kept) <= 100


# -- refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "no"}]}, "input[0].arguments"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#/no"}}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"input": "x " * 5000}, "input"),
        ({"stream_options": {}}, "stream_options"),
        ({"model": "other"}, "model"),
        ({"n": 2}, "n"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: Server, more: dict[str, Any], param: str) -> None:
    status, named, _ = server.error("/v1/responses", {**GREEDY, **more})
    assert (status, named) == (404 if param == "model" else 400, param)


# -- the parts by themselves -------------------------------------------------------------------------------
def test_text_and_calls_by_turns() -> None:
    growing = GrowingResponse({"id": "r"})
    wire = growing.opening()
    for delta in (Content("a"), Content("b"), CallBegins(0, "c0", "f"), CallArguments(0, "{"), CallArguments(0, "}")):
        wire += growing.add(delta)
    wire += growing.add(CallBegins(1, "c1", "g"))
    wire += growing.add(Content("z"))
    wire += growing.end(cut=False)
    names = [line.removeprefix("event: ") for line in wire.decode().splitlines() if line.startswith("event")]
    data = [json.loads(line.removeprefix("data: ")) for line in wire.decode().splitlines() if line.startswith("data")]
    assert [entry["type"] for entry in data] == names
    assert [entry["output_index"] for entry in data if entry["type"] == "response.output_item.done"] == [0, 1, 2, 3]
    kinds = [(item["type"], item["status"]) for item in growing.output]
    assert kinds == [(kind, "completed") for kind in ("message", "function_call", "function_call", "message")]
    assert growing.output[0]["content"][0]["text"] == "ab"
    assert [item["arguments"] for item in growing.output[1:3]] == ["{}", ""]
    opened = {entry["item"]["id"] for entry in data if entry["type"] == "response.output_item.added"}
    assert opened == {item["id"] for item in growing.output}
    empty = GrowingResponse({})
    empty.end(cut=True)
    assert empty.output[0]["status"] == "incomplete"


def test_items_of_a_conversation() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Hm."},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": ""},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "r"}]},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
    ]
    request = validate(ResponseRequest, {"input": items})
    messages = conversation_of((), request.input)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["1", "2"]
    assert messages[2] == {"role": "tool", "tool_call_id": "2", "name": "g", "content": "r"}
    output = [
        {"type": "message", "content": [{"text": "t"}], "status": "completed"},
        {"type": "function_call", "call_id": "4", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "5", "name": "f", "arguments": "{", "status": "incomplete"},
    ]
    ended = with_output(messages, output)
    assert len(ended) == 5
    assert [call["id"] for call in ended[4]["tool_calls"]] == ["4"]
    alone = with_output(messages, output[1:])
    assert len(alone) == 5, "a call of the answer is not put on what came before"
    assert "tool_calls" not in with_output([{"role": "assistant", "content": "a"}], output[1:])[0]
    assert instructed(None, messages) == messages
    with pytest.raises(ApiError):
        conversation_of((), validate(ResponseRequest, {"input": items[4:5]}).input)


def test_a_failure_in_the_middle_is_an_event(server: Server) -> None:
    error = ApiError(504, "Too long.")

    async def main() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            events = []
            async for event in await client.responses.create(
                model=MODEL, input="Count.", max_output_tokens=900, stream=True, extra_body={"ignore_eos": True}
            ):
                events.append(event)
                if len(events) == 8:
                    server.call(lambda: _fail_all(server, error))
            return events

    events = asyncio.run(main())
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.message == "Too long."
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def _fail_all(server: Server, error: ApiError) -> None:
    for running in list(server.service._running):
        running.fail(error)


def test_the_asynchronous_client(server: Server) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def streamed() -> str:
                stream: Any = await client.responses.create(**GREEDY, stream=True)
                return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

            whole, *streams = await asyncio.gather(client.responses.create(**GREEDY), *(streamed() for _ in range(3)))
            assert streams == [whole.output_text] * 3
            called: Any = await client.responses.create(**CALLING)
            assert called.output[0].type == "function_call"
            assert (await client.responses.retrieve(called.id)).output == called.output
            await client.responses.delete(called.id)

    asyncio.run(main())


def test_without_http(server: Server) -> None:
    """As in batches."""
    status, answer = server.call(lambda: server.service.answer("/v1/responses", GREEDY))
    assert (status, answer["object"]) == (200, "response")
