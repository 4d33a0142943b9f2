"""A model that answers by rote, in the shape of LLM: what commands do with answers, without a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from miaotui.engine.params import SamplingParams
from miaotui.errors import RequestError


@dataclass
class Completion:
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass
class Output:
    prompt_token_ids: list[int]
    outputs: list[Completion]


@dataclass
class FakeLLM:
    """Echoes the last message word by word; a message `interrupt` is interrupted half-way, `too long` refused."""

    model: str = "fake"
    options: dict[str, Any] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    chat_template: str | None = "a template"
    closed: bool = False

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[Output]:
        self.asked.append((prompt, params))
        if prompt == "too long":
            raise RequestError("The prompt is too long.", "Shorten it.")
        for word in (first := prompt.split()):
            yield Output([1, 2, 3], [Completion(word + " ", [len(word)])])
            if prompt.startswith("interrupt"):
                raise KeyboardInterrupt
        yield Output([1, 2, 3], [Completion("", [], "stop" if first else "length")])

    def stream_chat(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[Output]:
        self.asked.append(messages)
        return self.stream(messages[-1]["content"], params)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """Every LLM that a command makes is a FakeLLM; they are collected in the list."""
    made: list[FakeLLM] = []

    def make(model: str, **options: Any) -> FakeLLM:
        made.append(FakeLLM(model, options, chat_template=None if model == "base" else "a template"))
        return made[-1]

    module = ModuleType("miaotui.engine.llm")
    module.LLM = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "miaotui.engine.llm", module)
    return made
