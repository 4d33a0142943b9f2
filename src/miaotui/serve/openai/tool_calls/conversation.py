"""Tools, calls and their results in a conversation, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from miaotui.model.chat import ChatTemplate
from miaotui.serve.openai.errors import ApiError, refused
from miaotui.serve.openai.tool_calls.formats import HERMES, Format
from miaotui.serve.openai.tool_calls.offer import Offer, knows_tools

Message = dict[str, Any]


def for_template(
    template: ChatTemplate, messages: Sequence[Message], offer: Offer | None
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages and tools for `template`: the arguments of calls are objects, as templates expect them.

    For a template that does not know of tools, the messages themselves say what it would have. Raises ApiError for a
    call that is none.
    """
    tools = [] if offer is None else offer.shown
    parsed = [_with_arguments(i, message) for i, message in enumerate(messages)]
    if knows_tools(template.source(tools)):
        return parsed, tools or None
    return told_in_text(parsed, tools, HERMES if offer is None else offer.form), None


def _with_arguments(position: int, message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    where = f"messages[{position}].tool_calls"
    if not isinstance(calls, list):
        raise _no_call(where)
    return {**message, "tool_calls": [_parsed(f"{where}[{j}]", call) for j, call in enumerate(calls)]}


def _parsed(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _no_call(where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise _no_object(where) from None
    if not isinstance(arguments, dict):
        raise _no_object(where)
    return {**call, "function": {**function, "arguments": arguments}}


def _no_call(where: str) -> ApiError:
    return refused(f"{where} is no call of a function. Give its type, id and function.", where, "invalid_value")


def _no_object(where: str) -> ApiError:
    where += ".function.arguments"
    return refused(f"{where} is not the text of a JSON object. Send it as it came.", where, "invalid_value")


def told_in_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], form: Format) -> list[Message]:
    """The same conversation without fields for tools: they are described to the model, calls and results written out.

    The words and marks follow Hermes and Qwen, which a model has most likely seen.
    """
    told: list[Message] = []
    after_result = False
    for message in messages:
        result = message["role"] == "tool"
        if result:
            text = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            if after_result:
                told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n{text}"}
            else:
                told.append({"role": "user", "content": text})
        else:
            told.append(_calls_in_text(message, form))
        after_result = result
    if not tools:
        return told
    if told[0]["role"] == "system":
        first = told.pop(0)
        return [{**first, "content": f"{_text(first.get('content'))}\n\n{_described(tools, form)}"}, *told]
    return [{"role": "system", "content": _described(tools, form)}, *told]


def _calls_in_text(message: Message, form: Format) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        before, after = form.around(call["function"]["name"])
        calls.append(before + json.dumps(call["function"]["arguments"], ensure_ascii=False) + after)
    written = form.opens + form.between.join(calls) + form.closes
    said = _text(message.get("content"))
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": f"{said}\n{written}" if said else written}


def _text(content: Any) -> str:
    """The text of a message's content, parts one below the other."""
    if isinstance(content, list):
        return "\n".join(_part(i, part) for i, part in enumerate(content))
    return content or ""


def _part(position: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    where = f"messages.content[{position}]"
    raise refused(f"{where} is no text, which is all that is supported.", where, "invalid_value")


def _described(tools: Sequence[Mapping[str, Any]], form: Format) -> str:
    before, after = form.around("function-name")
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more of these functions to help the user. "
        f"Their signatures are within <tools></tools>:\n<tools>\n{listed}\n</tools>\n\n"
        "To call a function, write its name and its arguments as JSON like this:\n"
        f'{form.opens}{before}{{"argument-name": "value"}}{after}{form.closes}'
    )
