"""The ways in which families of models write calls, and how to tell from a chat template which one it is.

- `hermes`: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as in Hermes 2 Pro, Qwen 2.5, Qwen 3 and others;
- `llama3_json`: `{"name": …, "parameters": {…}}` as the whole answer, or after `<|python_tag|>`; several with `;`;
- `mistral`: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and since version 11 of its tokenizer
  `[TOOL_CALLS]name[ARGS]{…}`, each call with its own mark.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from miaotui.errors import UsageError
from miaotui.serve.openai.tool_calls.json_text import SPACE, Malformed
from miaotui.serve.openai.tool_calls.reading import Reader, Reading

PYTHON_TAG = "<|python_tag|>"
MARKS = ("<tool_call>", "</tool_call>", PYTHON_TAG, "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
"""Texts that are tokens of their own in models trained for tools. Where they are special, decoding must keep them."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]")


def read_hermes(reading: Reading) -> Reader[None]:
    while (yield from reading.until("<tool_call>")):
        first = yield from reading.next_solid()
        yield from reading.call_objects(first)
        first = yield from reading.next_solid()
        yield from reading.literal("</tool_call>", first)


def read_llama3(reading: Reading) -> Reader[None]:
    while found := (yield from reading.until(PYTHON_TAG, brace=True)):
        char = found if found == "{" else (yield from reading.next_solid())
        calls = reading.calls
        while char == "{":
            yield from reading.call_object(complete=True)
            char = yield from reading.next_solid()
            if char == ";":
                char = yield from reading.next_solid()
        if char or reading.calls == calls:
            raise Malformed
        reading.settle()
        return


def read_mistral(reading: Reading) -> Reader[None]:
    while (yield from reading.until("[TOOL_CALLS]")):
        first = yield from reading.next_solid()
        if first in ("[", "{"):
            yield from reading.call_objects(first)
        else:
            yield from _named_call(reading, first)


def _named_call(reading: Reading, first: str) -> Reader[None]:
    name, char = "", first
    while _NAME.match(char):
        name += char
        char = yield from reading.next()
    reading.known(name)
    if char == "[":
        tag = yield from _tag(reading)
        if tag == "[CALL_ID]":
            char = yield from reading.next()
            while _NAME.match(char):
                char = yield from reading.next()
            tag = (yield from _tag(reading)) if char == "[" else ""
        if tag != "[ARGS]":
            raise Malformed
        char = yield from reading.next()
    if char and char in SPACE:
        char = yield from reading.next_solid()
    if char != "{":
        raise Malformed
    reading.begin(name)
    yield from reading.tell_object()


def _tag(reading: Reading) -> Reader[str]:
    """A mark in brackets, whose first one has been read."""
    tag = "["
    while not tag.endswith("]"):
        char = yield from reading.next()
        if not char or len(tag) > len("[CALL_ID]"):
            raise Malformed
        tag += char
    return tag


@dataclass(frozen=True)
class Format:
    """How a family writes calls: a reader, and the texts between which the arguments stand."""

    name: str
    read: Callable[[Reading], Reader[None]]
    before: str
    """What stands before a call's arguments; `NAME` is its function."""
    after: str
    between: str
    """What stands between two calls."""
    opens: str = ""
    """What stands before all calls; `closes` after them."""
    closes: str = ""
    mark: str = ""
    """What tells calls from text. Without one, calls are the whole answer."""
    id_length: int | None = None
    """Characters of a call's id, where templates insist."""

    def around(self, name: str) -> tuple[str, str]:
        """The texts before and after the arguments of a call of this function."""
        return self.before.replace("NAME", name), self.after

    def new_id(self) -> str:
        if self.id_length is not None:
            return secrets.token_hex(self.id_length)[: self.id_length]
        return f"call_{secrets.token_hex(12)}"


HERMES = Format(
    "hermes",
    read_hermes,
    before='<tool_call>\n{"name": "NAME", "arguments": ',
    after="}\n</tool_call>",
    between="\n",
    mark="<tool_call>",
)
LLAMA3 = Format("llama3_json", read_llama3, before='{"name": "NAME", "parameters": ', after="}", between="; ")
MISTRAL = Format(
    "mistral",
    read_mistral,
    before='{"name": "NAME", "arguments": ',
    after="}",
    between=", ",
    opens="[TOOL_CALLS][",
    closes="]",
    mark="[TOOL_CALLS]",
    id_length=9,
)
MISTRAL_NAMED = replace(MISTRAL, before="[TOOL_CALLS]NAME[ARGS]", after="", between="", opens="", closes="")
FORMATS = {form.name: form for form in (HERMES, LLAMA3, MISTRAL)}
"""By the names of vLLM's `--tool-call-parser`."""


def format_of(template: str) -> Format | None:
    """The format that a chat template with tools asks for; None when it is none of ours."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return HERMES
    llama = PYTHON_TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template)
    return LLAMA3 if llama else None


def format_named(name: str, template: str) -> Format:
    """The format that the user has chosen; of Mistral's two ways, the template's. Raises UsageError."""
    if name not in FORMATS:
        raise UsageError(f"There is no tool call format {name!r}.", f"Choose one of {', '.join(FORMATS)}.")
    detected = format_of(template)
    return detected if detected is not None and detected.name == name else FORMATS[name]
