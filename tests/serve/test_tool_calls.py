"""Tool calls in answers: every format, cut at every place, against a reader of whole texts that knows no streams."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from miaotui.errors import UsageError
from miaotui.serve.openai.tool_calls.deltas import CallArguments, CallBegins, Content, Delta
from miaotui.serve.openai.tool_calls.formats import (
    FORMATS,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMED,
    Format,
    format_named,
    format_of,
)
from miaotui.serve.openai.tool_calls.reading import ToolCallStream

NAMES = ("f", "get_weather", "städte.suche")
Parsed = tuple[str, list[tuple[str, str]]]


def parse(form: Format, pieces: Sequence[str], names: Sequence[str] = NAMES) -> Parsed:
    """Text and calls (name, arguments) that the deltas of a stream add up to."""
    numbers = itertools.count()
    stream = ToolCallStream(form.read, names, lambda: f"id{next(numbers)}")
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += stream.push(piece)
    return add_up([*deltas, *stream.finish()])


def add_up(deltas: Sequence[Delta]) -> Parsed:
    text, calls = "", []
    for delta in deltas:
        match delta:
            case Content():
                assert delta.text
                text += delta.text
            case CallBegins():
                assert (delta.index, delta.id) == (len(calls), f"id{len(calls)}")
                calls.append((delta.name, ""))
            case CallArguments():
                assert delta.text
                assert delta.index == len(calls) - 1
                name, arguments = calls[-1]
                calls[-1] = (name, arguments + delta.text)
    return text, calls


def every_split(text: str) -> list[list[str]]:
    """Whole, in two at each place, and character by character."""
    return [[text], *([text[:i], text[i:]] for i in range(1, len(text))), list(text)]


# -- well-formed answers, against a reader of whole texts --------------------------------------------------
def twin(form: Format, text: str) -> Parsed:
    """The slow way: find the marks, and have json read the rest. For well-formed answers only."""
    decode = json.JSONDecoder().raw_decode
    calls: list[tuple[str, Any]] = []
    before, mark, rest = text, "", ""
    if form is LLAMA3:
        before, mark, rest = text.partition("<|python_tag|>")
        if not mark and text.lstrip().startswith("{"):
            before, rest = "", text
        while rest.strip(" ;\n"):
            call, end = decode(rest := rest.lstrip(" ;\n"))
            calls.append((call["name"], call["parameters"]))
            rest = rest[end:]
    elif form is HERMES:
        pieces = re.split(r"<tool_call>(.*?)</tool_call>", text, flags=re.DOTALL)
        before, rest = pieces[0], "".join(pieces[2::2])
        for found in map(json.loads, pieces[1::2]):
            calls += [(c["name"], c["arguments"]) for c in (found if isinstance(found, list) else [found])]
    else:
        before, *marked = text.split("[TOOL_CALLS]")
        for part in marked:
            name, has_name, arguments = part.partition("[ARGS]")
            if has_name:
                value, end = decode(arguments)
                calls.append((name.partition("[CALL_ID]")[0], value))
                rest = arguments[end:]
            else:
                found, end = decode(part.lstrip())
                calls += [(c["name"], c["arguments"]) for c in found]
                rest = part.lstrip()[end:]
    if not calls:
        return text, []
    rest = rest if rest.strip() else ""
    content = before.rstrip() + (rest if before.strip() else rest.lstrip())
    return content, calls


SIMPLE = '{"city": "Köln", "days": [1, -2.5e3, true, null], "deep": {"a": {"b": []}}}'
TRICKY = r'{"q": "say \"<tool_call>\" \\ \u00e4\ud83d\ude00 </tool_call> [TOOL_CALLS] } ] ; 🙂", "n": {}}'

WELL_FORMED: list[tuple[Format, str]] = [
    *(
        (HERMES, text)
        for text in (
            "Just text, with < and <tool and {braces}.\n",
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            f'<tool_call>{{"name": "get_weather", "arguments": {SIMPLE}}}</tool_call>',
            f'Let me see.\n\n<tool_call>\n{{"name": "f", "arguments": {SIMPLE}}}\n</tool_call>',
            f'<tool_call>\n{{"arguments": {SIMPLE}, "name": "f"}}\n</tool_call>',
            f'\n<tool_call>{{"name": "f", "arguments": {SIMPLE}}}</tool_call>\n'
            f'<tool_call>{{"name": "städte.suche", "arguments": {SIMPLE}}}</tool_call>\n',
            'One.\n<tool_call>{"name": "f", "arguments": {"a" : 1 }}</tool_call>\nTwo. ',
            '<tool_call>{"type": "function", "id": "x", "name": "f", "arguments": {}}</tool_call>',
            '<tool_call>[\n{"name": "f", "arguments": {"a": 1}},\n{"name": "f", "arguments": {}}]</tool_call>',
            r'<tool_call>{"name": "get_\u0077eather", "arguments": {"a": "\t"}}</tool_call>',
        )
    ),
    *(
        (LLAMA3, text)
        for text in (
            'Text with {"name": "f", "parameters": {}} in it.',
            '{"name": "f", "parameters": {}}',
            f'  {{"name": "get_weather", "parameters": {TRICKY}}}',
            f'{{"type": "function", "name": "f", "parameters": {SIMPLE}}}; {{"name": "f", "parameters": {{}}}}',
            f'<|python_tag|>{{"name": "f", "parameters": {TRICKY}}}',
            f'Look: <|python_tag|>{{"name": "f", "parameters": {SIMPLE}}};{{"parameters": {{}}, "name": "f"}}\n',
        )
    ),
    *(
        (MISTRAL, text)
        for text in (
            "[1] and [TOOL are text]",
            '[TOOL_CALLS][{"name": "f", "arguments": {}}]',
            f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {SIMPLE}}}, {{"name": "f", "arguments": {{}}}}]',
            f'Yes. [TOOL_CALLS] [{{"name": "f", "arguments": {SIMPLE}, "id": "123456789"}}] Done.',
            f"[TOOL_CALLS]get_weather[ARGS]{SIMPLE}",
            f"Yes.[TOOL_CALLS]f[ARGS]{SIMPLE}[TOOL_CALLS]städte.suche[ARGS]{{}}".replace("städte.suche", "f"),
            f"[TOOL_CALLS]f[CALL_ID]a1B2[ARGS]{SIMPLE}",
        )
    ),
]


@pytest.mark.parametrize(("form", "text"), WELL_FORMED)
def test_every_split_gives_what_the_whole_text_holds(form: Format, text: str) -> None:
    content, calls = twin(form, text)
    for pieces in every_split(text):
        said, found = parse(form, pieces)
        assert said == content, pieces
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls, pieces


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED])
def test_arguments_come_out_as_they_were_written(form: Format) -> None:
    before, after = form.around("f")
    call = before + TRICKY + after
    text = form.opens + call + form.between + call + form.closes
    for pieces in every_split(text):
        assert parse(form, pieces) == ("", [("f", TRICKY), ("f", TRICKY)]), pieces


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(st.text(), JSON, max_size=4)


@st.composite
def cut(draw: st.DrawFn, text: st.SearchStrategy[str]) -> list[str]:
    whole = draw(text)
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[a:b] for a, b in itertools.pairwise([0, *places, len(whole)])]


@st.composite
def answers(draw: st.DrawFn) -> tuple[Format, str, list[tuple[str, str]], list[str]]:
    """A format, what is said before the calls, the calls, and the answer in pieces."""
    form = draw(st.sampled_from([HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED]))
    said = draw(st.sampled_from(["", "So: <", "[TOOL", "é 🙂 {"])) if form.mark else ""
    calls = [
        (draw(st.sampled_from(NAMES[:2])), json.dumps(draw(ARGUMENTS), ensure_ascii=draw(st.booleans())))
        for _ in range(draw(st.integers(1, 3)))
    ]
    texts = [form.around(name)[0] + arguments + form.around(name)[1] for name, arguments in calls]
    text = said + form.opens + form.between.join(texts) + form.closes
    return form, said, calls, draw(cut(st.just(text)))


@given(answers())
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_random_calls_in_random_pieces(found: tuple[Format, str, list[tuple[str, str]], list[str]]) -> None:
    form, said, calls, pieces = found
    assert parse(form, pieces) == (said, calls)


_MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
_SIGNS = [*'f{}[]:,;"\\1-é \n\x01', "\\u00e", "tru", '"name"', '"arguments"', '"parameters"']
_STARTS = ['{"name": "f", "arguments": {', '{"name": "f", "parameters": {"a": ', '{"arguments": {}, ']
SCRAPS = st.sampled_from([*_MARKS, *_SIGNS, *_STARTS])


@given(st.sampled_from([HERMES, LLAMA3, MISTRAL]), cut(st.lists(SCRAPS, max_size=14).map("".join)))
@hypothesis_settings(max_examples=600, deadline=None, derandomize=True, database=None)
def test_rubbish_does_not_depend_on_the_pieces_and_nothing_of_it_is_lost(form: Format, pieces: list[str]) -> None:
    text = "".join(pieces)
    whole = parse(form, [text])
    assert parse(form, pieces) == whole
    assert parse(form, list(text)) == whole
    said, calls = whole
    if not calls:
        assert said == text
    else:
        assert is_within("".join(said.split()), text)
        for _, arguments in calls:
            assert arguments.startswith("{")
            assert is_within(arguments.replace("\\u0001", "\x01"), text) or arguments == "{}"


def is_within(part: str, text: str) -> bool:
    """Whether the characters of `part` are in `text`, in their order."""
    rest = iter(text)
    return all(char in rest for char in part)


# -- malformed answers -------------------------------------------------------------------------------------
NO_CALLS = [
    (HERMES, "<tool_call>\nnot JSON\n</tool_call>"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "thought": "hm", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {"a": 01}, "name": "f"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "argum'),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_cal"),
    (HERMES, "  "),
    (HERMES, r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'),
    (LLAMA3, '<|python_tag|>brave_search.call(query="x")'),
    (LLAMA3, '{"name": "Bob", "parameters": {}}'),
    (LLAMA3, '{"name": "f"}'),
    (LLAMA3, '{"answer": 42}\n'),
    (MISTRAL, "[TOOL_CALLS][]"),
    (MISTRAL, "[TOOL_CALLS]f[ARG]{}"),
    (MISTRAL, "[TOOL_CALLS]g[ARGS]{}"),
    (MISTRAL, "[TOOL_CALLS]f[CALL_ID]x{}"),
    (MISTRAL, "[TOOL_CALLS]f(1)"),
]


@pytest.mark.parametrize(("form", "text"), NO_CALLS)
def test_what_is_no_call_comes_out_as_text(form: Format, text: str) -> None:
    for pieces in every_split(text):
        assert parse(form, pieces) == (text, []), pieces


AFTER_A_BREAK = [
    (HERMES, "<tool_call>x<tool_call>{'a'} " + '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
    (MISTRAL, "[TOOL_CALLS]?" + '[TOOL_CALLS][{"name": "f", "arguments": {}}]'),
]


@pytest.mark.parametrize(("form", "text"), AFTER_A_BREAK)
def test_a_call_after_a_malformed_one_is_found(form: Format, text: str) -> None:
    for pieces in every_split(text):
        said, calls = parse(form, pieces)
        assert calls == [("f", "{}")]
        assert text.startswith(said)
        assert len(said) > 10


def test_a_break_within_arguments_leaves_the_rest_as_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": None}}</tool_call>'
    for pieces in every_split(text):
        assert parse(HERMES, pieces) == ("None}}</tool_call>", [("f", '{"a": ')])
    cut_off = '<tool_call>{"name": "f", "arguments": {"a": "b\\'
    for pieces in every_split(cut_off):
        assert parse(HERMES, pieces) == ("\\", [("f", '{"a": "b')])


def test_what_json_forbids_in_a_string_is_escaped() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"code": "a\n\tb"}}</tool_call>'
    for pieces in every_split(text):
        (_, arguments), *_ = parse(HERMES, pieces)[1]
        assert json.loads(arguments) == {"code": "a\n\tb"}


def test_arguments_as_the_text_of_an_object() -> None:
    inner = json.dumps({"a": 'x"y'})
    text = f'<tool_call>{{"name": "f", "arguments": {json.dumps(inner)}}}</tool_call>'
    for pieces in every_split(text):
        assert parse(HERMES, pieces) == ("", [("f", inner)])
    no_object = '<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>'
    assert parse(HERMES, [no_object]) == (no_object, [])


def test_a_call_without_arguments_has_empty_ones() -> None:
    assert parse(HERMES, ['<tool_call>{"name": "f"}</tool_call>']) == ("", [("f", "{}")])


def test_an_unclosed_list_or_mark_keeps_its_calls() -> None:
    call = '{"name": "f", "arguments": {}}'
    for text in (f"<tool_call>{call}", f"<tool_call>{call}\n</tool", f"<tool_call>{call}<tool_call>{call}"):
        assert parse(HERMES, list(text)) == ("", [("f", "{}")] * text.count("name"))
    assert parse(MISTRAL, [f"[TOOL_CALLS][{call}"]) == ("", [("f", "{}")])


# -- when things are told ----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED])
def test_arguments_are_told_while_they_are_written(form: Format) -> None:
    stream = ToolCallStream(form.read, NAMES, lambda: "id")
    before, after = form.around("f")
    told = stream.push(form.opens + before + '{"city": "Ber')
    assert told == [CallBegins(0, "id", "f"), CallArguments(0, '{"city": "Ber')]
    assert stream.push("lin\\") == [CallArguments(0, "lin")]
    assert stream.push('n"}') == [CallArguments(0, '\\n"}')]
    assert stream.push(after + form.closes) == []
    assert stream.finish() == []


def test_text_is_told_at_once_but_for_what_may_become_a_call() -> None:
    stream = ToolCallStream(HERMES.read, NAMES, lambda: "id")
    assert stream.push("Hello <b> and <tool") == [Content("Hello <b> and")]
    assert stream.push("box> ") == [Content(" <toolbox>")]
    assert stream.finish() == [Content(" ")]


def test_long_text_is_read_in_no_time() -> None:
    """A character at a time, but not the square of them: marks that come to nothing are read twice at most."""
    for form in (HERMES, LLAMA3, MISTRAL):
        for piece in ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>{", '<tool_call>{"arguments": {"a": "', "word "):
            text = piece * 2000
            assert parse(form, [text]) == (text, []) or "arguments" in piece


# -- which format ------------------------------------------------------------------------------------------
def test_the_template_tells_the_format() -> None:
    assert format_of("… <tool_call>\\n{{ tool_call.name }} …") is HERMES
    assert format_of('<|start_header_id|> … \'{"name": "\' … \'"parameters": \' …') is LLAMA3
    assert format_of("<|python_tag|>") is LLAMA3
    assert format_of("[TOOL_CALLS] [{") is MISTRAL
    assert format_of("[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}") is MISTRAL_NAMED
    assert format_of("<|im_start|>") is None
    assert set(FORMATS) == {"hermes", "llama3_json", "mistral"}
    assert format_named("hermes", "[TOOL_CALLS]") is HERMES
    assert format_named("mistral", "[ARGS][TOOL_CALLS]") is MISTRAL_NAMED
    with pytest.raises(UsageError, match="no tool call format 'pythonic'"):
        format_named("pythonic", "")


def test_the_user_s_choice_of_a_format() -> None:
    from miaotui.cli.serve import command
    from miaotui.serve.settings import ServeSettings

    (option,) = [option for option in command.params if option.name == "tool_call_parser"]
    assert set(getattr(option.type, "choices", ())) == set(FORMATS)
    with pytest.raises(UsageError, match="no tool call format"):
        ServeSettings(served_model_names=("m",), tool_call_parser="pythonic")


def test_ids_are_as_long_as_templates_want_them() -> None:
    assert len(MISTRAL.new_id()) == 9
    assert MISTRAL.new_id().isalnum()
    assert HERMES.new_id().startswith("call_")
    assert HERMES.new_id() != HERMES.new_id()
