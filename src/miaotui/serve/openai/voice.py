"""A choice as it is told: its text, and the calls that are found in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miaotui.engine.request import CompletionOutput
from miaotui.serve.openai.tool_calls.deltas import CallBegins, Content, Delta
from miaotui.serve.openai.tool_calls.reading import ToolCallStream

ChatDelta = dict[str, Any]
"""What a chunk adds to a message: `content`, or `tool_calls` with the next piece of a call."""


class Voice:
    """One choice as it is told. Without `calls` its text is told as it is."""

    def __init__(self, calls: ToolCallStream | None) -> None:
        self._calls = calls
        self._called = False

    def say(self, choice: CompletionOutput) -> list[Delta]:
        """The deltas of what is new in a choice; with its end, all that was held back."""
        if self._calls is None:
            return [Content(choice.text)] if choice.text else []
        deltas = self._calls.push(choice.text)
        if choice.finish_reason is not None:
            deltas += self._calls.finish()
        self._called = self._called or any(isinstance(delta, CallBegins) for delta in deltas)
        return deltas

    def finish_reason(self, choice: CompletionOutput) -> str | None:
        """Why it ended: for its calls, unless something cut it short."""
        return "tool_calls" if self._called and choice.finish_reason == "stop" else choice.finish_reason


def as_chat(delta: Delta) -> ChatDelta:
    """A delta as chunks of chat completions have it."""
    if isinstance(delta, Content):
        return {"content": delta.text}
    if isinstance(delta, CallBegins):
        function = {"name": delta.name, "arguments": ""}
        return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


def whole_message(deltas: Sequence[Delta]) -> ChatDelta:
    """`content` and `tool_calls` of a message whose deltas these are."""
    content, calls = "", list[ChatDelta]()
    for delta in deltas:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, CallBegins):
            function = {"name": delta.name, "arguments": ""}
            calls.append({"id": delta.id, "type": "function", "function": function})
        else:
            calls[delta.index]["function"]["arguments"] += delta.text
    return {"content": content or None, "tool_calls": calls} if calls else {"content": content}
