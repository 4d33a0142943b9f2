"""Items of `/v1/responses` as messages of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from miaotui.serve.openai.errors import refused
from miaotui.serve.openai.response_schemas import CallItem, MessageItem, Parts, ResultItem

Message = dict[str, Any]


def conversation_of(
    earlier: Sequence[Mapping[str, Any]], items: str | Sequence[MessageItem | CallItem | ResultItem]
) -> list[Message]:
    """An earlier conversation with these items after it.

    Calls belong to the assistant's message before them. Raises ApiError for a result whose call is nowhere.
    """
    messages = [dict(message) for message in earlier]
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for i, item in enumerate(items):
        if isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item.content)})
        elif isinstance(item, CallItem):
            _check_arguments(i, item)
            add_call(messages, item.call_id, item.name, item.arguments)
        else:
            name = _name_of(messages, item.call_id)
            if name is None:
                cause = f"input[{i}] is the output of {item.call_id[:80]!r}, and there is no such call before it."
                raise refused(f"{cause} Send the call too.", f"input[{i}].call_id", "invalid_value")
            content = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "name": name, "content": content})
    return messages


def add_call(messages: list[Message], call_id: str, name: str, arguments: str) -> None:
    """Put a call at the end of a conversation."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), call]}


def with_output(messages: Sequence[Mapping[str, Any]], output: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A conversation with a response's output after it; a call that was cut short is left out."""
    ended = [dict(message) for message in messages]
    answered = len(ended)
    for item in output:
        if item["type"] == "message":
            ended.append({"role": "assistant", "content": item["content"][0]["text"]})
        elif item["status"] == "completed":
            if len(ended) == answered:
                ended.append({"role": "assistant"})
            add_call(ended, item["call_id"], item["name"], item["arguments"])
    return ended


def instructed(instructions: str | None, messages: list[Message]) -> list[Message]:
    """With instructions first, as one with system messages that stand there: many templates know only one."""
    leading = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    texts = [text for text in (instructions, *(message["content"] for message in messages[:leading])) if text]
    return [*([{"role": "system", "content": "\n\n".join(texts)}] if texts else []), *messages[leading:]]


def _text(content: str | Parts) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _name_of(messages: Sequence[Message], call_id: str) -> str | None:
    for message in reversed(messages):
        for call in message.get("tool_calls", ()):
            if call["id"] == call_id:
                return str(call["function"]["name"])
    return None


def _check_arguments(position: int, item: CallItem) -> None:
    try:
        sound = isinstance(json.loads(item.arguments or "{}"), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        where = f"input[{position}].arguments"
        raise refused(f"{where} is not the text of a JSON object. Send it as it came.", where, "invalid_value")
