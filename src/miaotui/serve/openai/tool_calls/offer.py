"""The tools of a request: which functions may or must be called, and how that is held to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from miaotui.engine.params import SamplingParams, StructuredOutputs
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer
from miaotui.serve.openai.errors import refused
from miaotui.serve.openai.tool_calls.formats import HERMES, MARKS, Format, format_named, format_of
from miaotui.serve.openai.tool_calls.language import CallLanguage, Signature
from miaotui.serve.openai.tool_calls.reading import ToolCallStream

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Function:
    """A function on offer. `strict`: its arguments have to fit the schema also where calls are the model's choice."""

    name: str
    description: str | None
    parameters: Mapping[str, Any] | None
    strict: bool


@dataclass(frozen=True)
class Choice:
    """What the caller wants of the functions: `names` are those that may be called, None is all of them."""

    mode: Mode = "auto"
    names: tuple[str, ...] | None = None
    several: bool = True


@dataclass(frozen=True)
class Offer:
    """Functions offered to a model that writes calls in `form`."""

    functions: Sequence[Function]
    choice: Choice
    form: Format
    tokenizer: Tokenizer

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The functions as chat templates take them; none where none may be called."""
        if self.choice.mode == "none":
            return []
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    **({} if function.description is None else {"description": function.description}),
                    "parameters": dict(function.parameters or _NO_PARAMETERS),
                },
            }
            for function in self.functions
        ]

    def new_stream(self) -> ToolCallStream | None:
        """What finds the calls in one answer; None where it is to be told as it is."""
        if self.choice.mode == "none":
            return None
        return ToolCallStream(self.form.read, self._names, self.form.new_id)

    def constrain(self, params: SamplingParams) -> SamplingParams:
        """The parameters with which the answer is in the language of the offer.

        `required` and named functions: calls alone. `auto`: text and calls, in a language only where that is needed,
        for strict functions, for one call at most, or beside an answer in JSON.
        Raises ApiError for another language that cannot be had together with calls.
        """
        if self.choice.mode == "none":
            return params
        keep = any(self.tokenizer.id_of(mark) in self.tokenizer.special_ids for mark in MARKS)
        params = replace(params, skip_special_tokens=params.skip_special_tokens and not keep)
        grammar = self._grammar(params.structured_outputs)
        return params if grammar is None else replace(params, structured_outputs=StructuredOutputs(grammar=grammar))

    def _grammar(self, wanted: StructuredOutputs | None) -> str | None:
        if self.choice.mode == "required":
            if wanted is not None:
                raise refused("A required call leaves no answer to be in another language. Leave one out.", "tools")
            return self._language.only_calls()
        if wanted is not None:
            if not isinstance(wanted.json, Mapping):
                raise refused("With tools, only an answer in JSON can be asked for. Leave one out.", "tools")
            return self._language.calls_or(wanted.json)
        if any(function.strict for function in self._callable) or not self.choice.several:
            return self._language.calls_in_text()
        return None

    @property
    def _language(self) -> CallLanguage:
        checked = self.choice.mode == "required"
        signatures = [Signature(f.name, _schema(f) if checked or f.strict else _ANY_OBJECT) for f in self._callable]
        return CallLanguage(self.form, signatures, self.choice.several, self.tokenizer)

    @cached_property
    def _callable(self) -> list[Function]:
        names = self.choice.names
        return [function for function in self.functions if names is None or function.name in names]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(function.name for function in self._callable)


_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def make_offer(
    functions: Sequence[Function],
    choice: Choice,
    *,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    parser: str | None,
) -> Offer | None:
    """The offer of a request's functions; None when it has none. `parser` is the user's choice of a format.

    Raises ApiError for a choice that cannot be met, and where the model's way of writing calls is not known.
    """
    if not functions:
        if choice.mode == "required" or choice.names is not None:
            raise refused("tool_choice asks for a call, but there are no tools. Give some.", "tool_choice")
        return None
    names = [function.name for function in functions]
    for function in functions:
        if names.count(function.name) > 1:
            raise refused(f"Two tools have the name {function.name!r}. Rename one.", "tools")
        if (function.parameters or _ANY_OBJECT).get("type", "object") != "object":
            raise refused(f"The parameters of {function.name!r} are no schema of an object. Make them one.", "tools")
    unknown = next((name for name in choice.names or () if name not in names), None)
    if unknown is not None:
        raise refused(f"tool_choice names {unknown!r}, which is none of the tools. Offer it.", "tool_choice")
    if choice.names == ():
        raise refused("tool_choice allows no tool. Allow one, or choose none.", "tool_choice")
    return Offer(functions, choice, _form(template, parser), tokenizer)


def knows_tools(template: str) -> bool:
    """Whether a chat template shows tools to the model."""
    return re.search(r"\btools\b", template) is not None


def _form(template: ChatTemplate | None, parser: str | None) -> Format:
    """How this model writes calls. A template that does not show tools is helped out, in Hermes' words."""
    source = "" if template is None else template.source([{}])
    if parser is not None:
        return format_named(parser, source)
    detected = format_of(source)
    if detected is not None or not knows_tools(source):
        return detected or HERMES
    raise refused(
        "How this model writes tool calls is not known. Start the server with --tool-call-parser, or leave tools out.",
        "tools",
        "unsupported_parameter",
    )


def _schema(function: Function) -> Mapping[str, Any]:
    return {"type": "object", **(function.parameters or _NO_PARAMETERS)}
