"""Completions, tokenize and the small endpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

import miaotui
from tests.serve.serving import MODEL, Server

TEXT = "The capital of France is"


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_continuation(client: OpenAI) -> None:
    answer = client.completions.create(model="alias", prompt=TEXT, max_tokens=5, temperature=0)
    assert (answer.object, answer.model) == ("text_completion", "alias")
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert client.completions.create(model=MODEL, prompt=TEXT, temperature=0).usage.completion_tokens == 16  # type: ignore[union-attr]
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=TEXT, max_tokens=5, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == answer.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == answer.usage or chunks[-1].usage.completion_tokens == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_in_text_and_ids(client: OpenAI, server: Server, stream: bool) -> None:
    ids = server.post("/tokenize", {"prompt": "Two plus two is"})[2]["tokens"]
    prompts: list[Any] = [TEXT, ids]
    singles = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in prompts
    ]
    asked: Any = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=6, temperature=0, stream=stream)
    texts = dict.fromkeys(range(4), "")
    for part in asked if stream else [asked]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [singles[0], singles[0], singles[1], singles[1]]


def test_echo_and_logprobs(client: OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=4, temperature=0, logprobs=2)
    assert plain.choices[0].logprobs is not None
    assert "".join(plain.choices[0].logprobs.tokens or []) == plain.choices[0].text
    echoed = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=4, temperature=0, logprobs=2, echo=True)
    assert echoed.choices[0].text == TEXT + plain.choices[0].text
    found = echoed.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == echoed.choices[0].text
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[-4:] == pytest.approx(plain.choices[0].logprobs.token_logprobs, abs=1e-3)
    assert found.text_offset is not None
    for token, offset in zip(found.tokens or [], found.text_offset, strict=True):
        assert echoed.choices[0].text[offset:].startswith(token)
    assert all(top is None or 2 <= len(top) <= 3 for top in found.top_logprobs or [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone_is_scored(client: OpenAI, stream: bool) -> None:
    """`echo` with `max_tokens` 0, as evaluation harnesses ask: the prompt's own tokens and nothing else."""
    asked: Any = client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=0, echo=True, logprobs=1, temperature=0, stream=stream
    )
    parts = list(asked) if stream else [asked]
    assert "".join(part.choices[0].text for part in parts) == TEXT
    tokens = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.tokens]
    assert "".join(tokens) == TEXT
    assert parts[-1].choices[0].finish_reason == "length"
    if not stream:
        assert asked.usage.completion_tokens == 0


def test_stop_token_ids_and_min_tokens(client: OpenAI, server: Server) -> None:
    def ask(**extra: Any) -> Any:
        return client.completions.create(model=MODEL, prompt=TEXT, max_tokens=8, temperature=0, extra_body=extra)

    text = ask().choices[0].text
    (first, *_) = server.post("/tokenize", {"prompt": text, "add_special_tokens": False})[2]["tokens"]
    stopped = ask(stop_token_ids=[first])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    held = ask(stop_token_ids=[first], min_tokens=3)
    assert held.usage.completion_tokens >= 3


def test_structured_outputs(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=TEXT, temperature=0, extra_body={"structured_outputs": {"choice": ["London", "Berlin"]}}
    )
    assert answer.choices[0].text in ("London", "Berlin")
    answer = client.completions.create(
        model=MODEL, prompt=TEXT, temperature=0, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}
    )
    assert answer.choices[0].text.isdigit()


CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": 5000}, "max_tokens"),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature"),
        ("completions", {"prompt": "x", "temperature": True}, "temperature"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias"),
        ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ("completions", {"prompt": "x", "stop": [""]}, "stop"),
        ("completions", {"prompt": "x", "stop": ["a"] * 65}, "stop"),
        ("completions", {"prompt": "x", "n": 9}, "n"),
        ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"prompt": "x", "stream": True, "stream_options": {"a": 1}}, "stream_options.a"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [[1], [99999999]]}, "prompt"),
        ("completions", {"prompt": [[1], ["x"]]}, "prompt[1][0]"),
        ("completions", {"prompt": "long " * 200_000}, "prompt"),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs"),
        ("completions", {}, "prompt"),
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "long " * 200_000}]}, "messages"),
        ("chat/completions", {**CHAT, "top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ("chat/completions", {**CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat/completions", {**CHAT, "max_completion_tokens": 9999}, "max_completion_tokens"),
        ("chat/completions", {**CHAT, "store": True}, "store"),
        ("chat/completions", {**CHAT, "modalities": ["audio"]}, "modalities[0]"),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, "response_format.type"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            "chat/completions",
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}},
            "response_format",
        ),
    ],
)
def test_what_cannot_be_served_is_named(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    status, found, _ = server.error(f"/v1/{path}", body)
    assert (status, found) == (400, param)


def test_bodies_that_are_not_requests(server: Server) -> None:
    assert server.error("/v1/completions", b"{")[2] == "invalid_json"
    assert server.error("/v1/completions", b"[1]")[2] == "invalid_json"
    assert server.error("/v1/completions", b'{"prompt": "\xff"}')[2] == "invalid_json"
    assert server.error("/v1/completions", b'{"prompt": "\\ud800"}')[0] == 400
    assert server.post("/v1/completions", {"prompt": "x"}, **{"content-type": "text/plain"})[0] == 415
    assert server.post("/v1/nothing", {})[0] == 404
    assert server.get("/v1/completions")[0] == 405
    assert "error" in server.get("/nothing")[2]


def test_tokenize_and_back(server: Server) -> None:
    text = "héllo <|im_end|> 秒推"
    status, _, answer = server.post("/tokenize", {"model": MODEL, "prompt": text, "return_token_strs": True})
    assert status == 200
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert "<|im_end|>" in answer["token_strs"]
    assert server.post("/detokenize", {"tokens": answer["tokens"]})[2] == {"prompt": text}
    assert server.post("/detokenize", {"tokens": []})[2] == {"prompt": ""}
    assert server.error("/detokenize", {"tokens": [1 << 40]})[:2] == (400, "tokens")
    assert server.error("/tokenize", {"model": "other", "prompt": text})[0] == 404
    assert server.error("/tokenize", {})[:2] == (400, "prompt")
    assert server.error("/tokenize", {"prompt": "x", "tools": []})[:2] == (400, "tools")
    long = {"messages": [{"role": "user", "content": "long " * 200_000}]}
    assert server.error("/tokenize", long) == (400, "messages", "context_length_exceeded")


def test_the_models_list(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL, "alias"]
    assert client.models.retrieve("alias").model_dump()["max_model_len"] == 1024
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_state_and_version(server: Server) -> None:
    assert server.get("/health")[0] == server.get("/ping")[0] == 200
    assert server.get("/ready")[2] == {"status": "ready"}
    assert server.get("/version")[2] == {"version": miaotui.__version__}


def test_the_openapi_document_is_whole(server: Server) -> None:
    """Every reference leads somewhere, and the request bodies are described."""
    _, _, document = server.get("/openapi.json")

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    schemas = document["components"]["schemas"]
    assert {reference.rpartition("/")[2] for reference in references(document)} <= set(schemas)
    assert "messages" in schemas["ChatRequest"]["properties"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
