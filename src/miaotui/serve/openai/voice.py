"""A choice as it is told: its text, and the calls that are found in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from miaotui.engine.request import CompletionOutput

Delta = dict[str, Any]
"""What a chunk adds to a message: `content`, or `tool_calls` with the next piece of a call."""


class ToolParser(Protocol):
    """Finds calls in an answer's text as it comes."""

    def feed(self, text: str) -> Sequence[Delta]:
        """The deltas that this piece of text makes certain."""
        ...

    def finish(self) -> Sequence[Delta]:
        """The rest, once no text will follow."""
        ...


class Voice:
    """One choice as it is told: its text, and the calls that a parser finds in it."""

    def __init__(self, new_parser: Callable[[], ToolParser] | None) -> None:
        self._parser = None if new_parser is None else new_parser()
        self._called = False

    def say(self, choice: CompletionOutput) -> list[Delta]:
        """The deltas of what is new in a choice; with its end, all that was held back."""
        if self._parser is None:
            return [{"content": choice.text}] if choice.text else []
        deltas = list(self._parser.feed(choice.text)) if choice.text else []
        if choice.finish_reason is not None:
            deltas += self._parser.finish()
        self._called = self._called or any("tool_calls" in delta for delta in deltas)
        return deltas

    def finish_reason(self, choice: CompletionOutput) -> str | None:
        """Why it ended: for its calls, unless something cut it short."""
        return "tool_calls" if self._called and choice.finish_reason == "stop" else choice.finish_reason


def whole_message(deltas: Sequence[Delta]) -> Delta:
    """`content` and `tool_calls` of a message whose deltas these are."""
    content = "".join(delta.get("content") or "" for delta in deltas)
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"id": "", "type": "function", "function": {"arguments": ""}})
            call["id"] = part.get("id") or call["id"]
            function = part.get("function", {})
            call["function"]["name"] = function.get("name") or call["function"].get("name", "")
            call["function"]["arguments"] += function.get("arguments") or ""
    if not calls:
        return {"content": content}
    return {"content": content or None, "tool_calls": [calls[index] for index in sorted(calls)]}
