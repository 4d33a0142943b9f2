"""Chat completions, as the official client sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serve.serving import MODEL, Server

QUESTION: list[Any] = [{"role": "user", "content": "What is gravity?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_an_answer_is_what_the_engine_gives(client: OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(**GREEDY, max_tokens=12)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.content.startswith("Gravity is")
    assert (choice.finish_reason, choice.index) == ("length", 0)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, answer.usage.prompt_tokens + 12)
    again = client.chat.completions.create(**GREEDY, max_completion_tokens=12)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == (answer.usage.prompt_tokens - 1) // 16 * 16


def test_a_stream_adds_up_to_the_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, max_tokens=24)
    chunks = list(
        client.chat.completions.create(**GREEDY, max_tokens=24, stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    *told, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in told) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in told] == [None] * (len(told) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in told)
    assert last.choices == []
    assert whole.usage is not None
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    plain = list(client.chat.completions.create(**GREEDY, max_tokens=4, stream=True))
    assert all(chunk.choices for chunk in plain)


def test_the_asynchronous_client(server: Server) -> None:
    async def main() -> tuple[str, list[str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(**GREEDY, max_tokens=16)

            async def streamed() -> str:
                stream = await client.chat.completions.create(**GREEDY, max_tokens=16, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return whole.choices[0].message.content or "", list(await asyncio.gather(*(streamed() for _ in range(5))))

    whole, streams = asyncio.run(main())
    assert whole
    assert streams == [whole] * 5


def test_stop_strings_end_an_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, max_tokens=30).choices[0].message.content or ""
    stop = whole[20:26]
    answer = client.chat.completions.create(**GREEDY, max_tokens=30, stop=[stop, "never there"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    kept = client.chat.completions.create(
        **GREEDY, max_tokens=30, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].message.content == whole[: whole.index(stop) + len(stop)]


def test_an_answer_ends_by_itself(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Say only the word: yes"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=200)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in (answer.choices[0].message.content or "")
    longer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=200, extra_body={"ignore_eos": True}
    )
    assert longer.choices[0].finish_reason == "length"
    assert longer.usage is not None
    assert longer.usage.completion_tokens == 200


def test_several_choices_and_a_seed(client: OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, n=3, seed=seed, max_tokens=12, temperature=1.2
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content or "" for choice in answer.choices]

    first = ask(7)
    assert len(set(first)) > 1
    assert ask(7) == first
    assert ask(8) != first
    texts = ["", "", ""]
    ends: list[Any] = [None, None, None]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, seed=7, max_tokens=12, temperature=1.2, stream=True
    ):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason
    assert texts == first
    assert ends == ["length"] * 3


def test_controls_change_the_answer(client: OpenAI, server: Server) -> None:
    _, _, found = server.post("/tokenize", {"prompt": "Gra", "add_special_tokens": False})
    (token,) = found["tokens"]
    plain = client.chat.completions.create(**GREEDY, max_tokens=24).choices[0].message.content or ""
    banned = client.chat.completions.create(**GREEDY, max_tokens=24, logit_bias={str(token): -100})
    assert plain.startswith("Gra")
    assert not (banned.choices[0].message.content or "").startswith("Gra")
    for control in ({"repetition_penalty": 1.8}, {"presence_penalty": 2.0, "frequency_penalty": 2.0}):
        changed = client.chat.completions.create(**GREEDY, max_tokens=24, extra_body=control)
        assert changed.choices[0].message.content != plain
    for control in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        hot = {**GREEDY, "temperature": 2.0}
        narrowed = client.chat.completions.create(**hot, max_tokens=24, extra_body=control)
        assert narrowed.choices[0].message.content == plain


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, max_tokens=8, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 8
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        ranked = [likely.logprob for likely in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert entry.logprob == ranked[0] <= 0
    streamed: list[str] = []
    for chunk in client.chat.completions.create(**GREEDY, max_tokens=8, logprobs=True, stream=True):
        found = chunk.choices[0].logprobs
        for entry in (found.content if found else None) or []:
            assert entry.top_logprobs == []
            streamed.append(entry.token)
    assert streamed == [entry.token for entry in content]


def test_the_token_that_ends_an_answer_has_no_logprob(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Say only the word: yes"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=200, logprobs=True
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_json(client: OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    formats: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        {"type": "json_object"},
        {"type": "text"},
    ]
    texts = []
    for wanted in formats:
        answer: Any = client.chat.completions.create(
            **{**GREEDY, "messages": [{"role": "user", "content": "Describe a person in JSON."}]},
            response_format=wanted,
            max_tokens=120,
            stream=stream,
        )
        if stream:
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in answer))
        else:
            texts.append(answer.choices[0].message.content)
    person = json.loads(texts[0])
    assert sorted(person) == ["age", "name"]
    assert isinstance(person["age"], int)
    assert texts[1].lstrip().startswith("{")
    assert not texts[2].lstrip().startswith("{")


def test_roles_parts_and_template_variables(server: Server) -> None:
    def ids(messages: list[Any], **more: Any) -> list[int]:
        status, _, answer = server.post("/tokenize", {"messages": messages, **more})
        assert status == 200, answer
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 1024
        tokens: list[int] = answer["tokens"]
        return tokens

    system, developer = ([{"role": role, "content": "Be brief."}, *QUESTION] for role in ("system", "developer"))
    assert ids(system) == ids(developer) != ids(QUESTION)
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "gravity?"}]}]
    assert ids(parts) == ids([{"role": "user", "content": "What is\ngravity?"}])
    assert (
        ids(QUESTION, add_generation_prompt=False) == ids(QUESTION)[: len(ids(QUESTION, add_generation_prompt=False))]
    )
    assert ids(QUESTION, chat_template_kwargs={"unused": 1}) == ids(QUESTION)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert server.error("/v1/chat/completions", {"messages": image})[:2] == (400, "messages[0].content[0]")
    taken = {"messages": QUESTION, "chat_template_kwargs": {"messages": []}}
    assert server.error("/v1/chat/completions", taken)[:2] == (400, "chat_template_kwargs")


def test_the_client_gets_typed_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(**GREEDY, extra_body={"colour": "blue"})
    assert (unknown.value.param, unknown.value.code) == ("colour", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello " * 2000}])
    assert (long.value.param, long.value.code) == ("messages", "context_length_exceeded")


def test_urgent_requests_go_first(server: Server) -> None:
    """Eight seats are taken; of those that wait, the one of the smallest priority is answered first."""

    async def main() -> list[str]:
        ended: list[str] = []
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(name: str, priority: int, tokens: int) -> None:
                extra = {"priority": priority, "ignore_eos": True}
                await client.chat.completions.create(**GREEDY, max_tokens=tokens, extra_body=extra)
                ended.append(name)

            holding = [asyncio.create_task(ask("holding", 0, 150)) for _ in range(8)]
            await asyncio.to_thread(server.wait_for, lambda stats: stats.running == 8)
            later = asyncio.create_task(ask("later", 2, 1))
            await asyncio.to_thread(server.wait_for, lambda stats: stats.waiting == 1)
            sooner = asyncio.create_task(ask("sooner", 1, 1))
            await asyncio.to_thread(server.wait_for, lambda stats: stats.waiting == 2)
            await asyncio.gather(*holding, later, sooner)
        return [name for name in ended if name != "holding"]

    assert asyncio.run(main()) == ["sooner", "later"]
