"""The language of required calls, and what a request's tools become."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from miaotui.checkpoint import open_checkpoint
from miaotui.engine.params import SamplingParams, StructuredOutputs
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer
from miaotui.serve.openai.errors import ApiError
from miaotui.serve.openai.tool_calls.conversation import for_template, told_in_text
from miaotui.serve.openai.tool_calls.formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, Format
from miaotui.serve.openai.tool_calls.language import CallLanguage, Signature
from miaotui.serve.openai.tool_calls.offer import Choice, Function, make_offer

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS = (Signature("get_weather", CITY), Signature("f", {"type": "object"}))
FORMS = [HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED]


@cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(open_checkpoint(path))


@pytest.fixture
def tokenizer(demo_gguf: Path) -> Tokenizer:
    return _tokenizer(demo_gguf)


MARKED = {"[TOOL_CALLS]": "<repo_name>", "[ARGS]": "<reponame>"}


class Marked:
    """The demo's tokenizer, as if some of its special tokens were Mistral's marks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special_ids = tokenizer.special_ids
        self.id_of = lambda text: tokenizer.id_of(MARKED.get(text, text))


def accepts(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether a whole answer is in the language."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_tables(tokenizer), LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@cache
def _tables(tokenizer: Tokenizer) -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.backend.to_str(), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_ids))


def written(form: Format, *calls: tuple[str, str]) -> str:
    texts = [form.around(name)[0] + arguments + form.around(name)[1] for name, arguments in calls]
    return form.opens + form.between.join(texts) + form.closes


GOOD = ("get_weather", '{"city": "Köln", "days": 3}')
WRONG = [
    ("get_weather", '{"days": 3}'),
    ("get_weather", '{"city": 3}'),
    ("get_weather", '{"city": "x", "more": 1}'),
    ("other", "{}"),
    ("f", "[]"),
]


@pytest.mark.parametrize("form", FORMS)
def test_only_calls_that_fit_their_schemas(form: Format, tokenizer: Tokenizer) -> None:
    grammar = CallLanguage(form, FUNCTIONS, True, tokenizer).only_calls()
    assert accepts(tokenizer, grammar, written(form, GOOD))
    assert accepts(tokenizer, grammar, written(form, GOOD, ("f", '{"a": [1, {}]}'), GOOD))
    for call in WRONG:
        assert not accepts(tokenizer, grammar, written(form, call)), call
    assert not accepts(tokenizer, grammar, "Hello")
    assert not accepts(tokenizer, grammar, "")
    single = CallLanguage(form, FUNCTIONS, False, tokenizer).only_calls()
    assert accepts(tokenizer, single, written(form, GOOD))
    assert not accepts(tokenizer, single, written(form, GOOD, GOOD))


@pytest.mark.parametrize("form", FORMS)
def test_text_with_calls_that_fit(form: Format, tokenizer: Tokenizer) -> None:
    grammar = CallLanguage(form, FUNCTIONS, True, tokenizer).calls_in_text()
    said = "Let me see {x} <tool.\n" if form.mark else ""
    for text in ("", "Hello [1] <b> { }\nyou", said + written(form, GOOD), said + written(form, GOOD, GOOD)):
        assert accepts(tokenizer, grammar, text), text
    for call in WRONG:
        assert not accepts(tokenizer, grammar, said + written(form, call)), call
    single = CallLanguage(form, FUNCTIONS, False, tokenizer).calls_in_text()
    for text in ("Hello", said + written(form, GOOD)):
        assert accepts(tokenizer, single, text), text
    assert not accepts(tokenizer, single, said + written(form, GOOD, GOOD))


@pytest.mark.parametrize("form", FORMS)
def test_calls_or_an_answer_in_json(form: Format, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    grammar = CallLanguage(form, FUNCTIONS, True, tokenizer).calls_or(schema)
    assert accepts(tokenizer, grammar, '{"answer": 42}')
    mark = "" if form.mark else "<|python_tag|>"
    assert accepts(tokenizer, grammar, mark + written(form, GOOD))
    assert not accepts(tokenizer, grammar, "Hello")
    assert not accepts(tokenizer, grammar, mark + written(form, WRONG[0]))


@pytest.mark.parametrize("form", [MISTRAL, MISTRAL_NAMED])
def test_marks_that_are_special_tokens_are_those_tokens(form: Format, tokenizer: Tokenizer) -> None:
    language = CallLanguage(form, FUNCTIONS, True, Marked(tokenizer))  # type: ignore[arg-type]

    def marked(text: str) -> str:
        for mark, token in MARKED.items():
            text = text.replace(mark, token)
        return text

    for grammar in (language.only_calls(), language.calls_in_text()):
        assert accepts(tokenizer, grammar, marked(written(form, GOOD)))
        assert not accepts(tokenizer, grammar, marked(written(form, WRONG[0])))
    assert not accepts(tokenizer, language.only_calls(), written(form, GOOD))
    assert accepts(tokenizer, language.calls_in_text(), marked("Hello " + written(form, GOOD)))


# -- offers ------------------------------------------------------------------------------------------------
WEATHER = Function("get_weather", "The weather.", CITY, False)
STRICT = Function("f", None, None, True)
PLAIN_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOL_TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


def offer(tokenizer: Any, *functions: Function, choice: Choice | None = None, **more: Any) -> Any:
    options = more if "template" in more else {"template": ChatTemplate(TOOL_TEMPLATE, tokenizer), **more}
    return make_offer(functions, choice or Choice(), tokenizer=tokenizer, **{"parser": None, **options})


def test_a_language_is_asked_for_only_where_it_is_needed(tokenizer: Tokenizer) -> None:
    params = SamplingParams()

    def language(*functions: Function, choice: Choice | None = None, params: SamplingParams = params) -> str | None:
        made = offer(tokenizer, *functions, choice=choice).constrain(params).structured_outputs
        return None if made is None else made.grammar

    assert language(WEATHER) is None
    assert language(WEATHER, choice=Choice("none")) is None
    assert language(STRICT, choice=Choice(names=("f",))) is not None
    assert language(WEATHER, STRICT, choice=Choice(names=("get_weather",))) is None
    one = language(WEATHER, choice=Choice(several=False))
    assert one is not None
    assert accepts(tokenizer, one, written(HERMES, ("get_weather", '{"any": 1}')))
    strict = language(WEATHER, STRICT)
    assert strict is not None
    assert accepts(tokenizer, strict, "Hello " + written(HERMES, ("get_weather", '{"any": 1}'), ("f", "{}")))
    named = language(WEATHER, STRICT, choice=Choice("required", ("get_weather",), False))
    assert named is not None
    assert accepts(tokenizer, named, written(HERMES, GOOD))
    assert not accepts(tokenizer, named, written(HERMES, ("f", "{}")))
    in_json = SamplingParams(structured_outputs=StructuredOutputs(json={"type": "object"}))
    both = language(WEATHER, params=in_json)
    assert both is not None
    assert accepts(tokenizer, both, '{"a":1}')
    for impossible in (StructuredOutputs(regex="a+"), StructuredOutputs(choice=["a"])):
        with pytest.raises(ApiError, match="only an answer in JSON"):
            language(WEATHER, params=SamplingParams(structured_outputs=impossible))
    with pytest.raises(ApiError, match="no answer to be in another language"):
        language(WEATHER, choice=Choice("required"), params=in_json)


def test_offers_that_cannot_be_made(tokenizer: Tokenizer) -> None:
    assert offer(tokenizer) is None
    assert offer(tokenizer, choice=Choice("none")) is None
    broken: list[tuple[tuple[Function, ...], Choice, str]] = [
        ((), Choice("required"), "tool_choice"),
        ((), Choice("auto", ("f",)), "tool_choice"),
        ((WEATHER, WEATHER), Choice(), "tools"),
        ((Function("f", None, {"type": "string"}, False),), Choice(), "tools"),
        ((WEATHER,), Choice("required", ("f",)), "tool_choice"),
        ((WEATHER,), Choice("auto", ()), "tool_choice"),
    ]
    for functions, choice, param in broken:
        with pytest.raises(ApiError) as caught:
            offer(tokenizer, *functions, choice=choice)
        assert (caught.value.status, caught.value.param) == (400, param)


def test_the_format_is_the_template_s_or_the_user_s(tokenizer: Tokenizer) -> None:
    strange = ChatTemplate("{{ tools | tojson }} [functools]", tokenizer)
    with pytest.raises(ApiError, match="--tool-call-parser"):
        offer(tokenizer, WEATHER, template=strange)
    assert offer(tokenizer, WEATHER, template=strange, parser="llama3_json").form is LLAMA3
    assert offer(tokenizer, WEATHER).form is HERMES
    assert offer(tokenizer, WEATHER, template=ChatTemplate(PLAIN_TEMPLATE, tokenizer)).form is HERMES
    new = ChatTemplate("{{ tools }}[TOOL_CALLS]x[ARGS]", tokenizer)
    assert offer(tokenizer, WEATHER, template=new).form is MISTRAL_NAMED


def test_special_marks_are_kept_in_the_text(tokenizer: Tokenizer) -> None:
    assert offer(tokenizer, WEATHER).constrain(SamplingParams()).skip_special_tokens
    marked = offer(Marked(tokenizer), WEATHER, template=None).constrain(SamplingParams())
    assert not marked.skip_special_tokens


# -- conversations -----------------------------------------------------------------------------------------
def called(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "Hm.", "tool_calls": [called('{"city": "Köln"}')]},
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "wind"}]},
]


def test_templates_get_arguments_as_objects(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TOOL_TEMPLATE, tokenizer)
    messages, tools = for_template(template, TALK, offer(tokenizer, WEATHER))
    assert tools is not None
    assert tools[0]["function"]["name"] == "get_weather"
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln"}
    assert 'get_weather={"city": "Köln"}' in template.render(messages, tools)
    assert TALK[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Köln"}'
    for empty in ("", {}, " "):
        (message,), _ = for_template(template, [{"role": "assistant", "tool_calls": [called(empty)]}], None)
        assert message["tool_calls"][0]["function"]["arguments"] == {}
    assert for_template(template, TALK, offer(tokenizer, WEATHER, choice=Choice("none")))[1] is None


@pytest.mark.parametrize(
    ("calls", "param"),
    [
        ("x", ""),
        ([1], "[0]"),
        ([{"function": {}}], "[0]"),
        ([called("no")], "[0].function.arguments"),
        ([called("[" * 100_000)], "[0].function.arguments"),
        ([called({}), called("[1]")], "[1].function.arguments"),
        ([called(None)], "[0].function.arguments"),
    ],
)
def test_calls_that_are_none_are_refused_by_name(calls: Any, param: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError) as caught:
        for_template(
            ChatTemplate(TOOL_TEMPLATE, tokenizer), [TALK[0], {"role": "assistant", "tool_calls": calls}], None
        )
    assert (caught.value.status, caught.value.param) == (400, f"messages[1].tool_calls{param}")


def test_a_template_without_tools_is_helped_out(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(PLAIN_TEMPLATE, tokenizer)
    messages, tools = for_template(template, TALK, offer(tokenizer, WEATHER, template=template))
    assert tools is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert json.dumps(CITY) in messages[0]["content"]
    assert "<tool_call>" in messages[0]["content"]
    expected = 'Hm.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    assert messages[2] == {"role": "assistant", "content": expected}
    assert messages[3]["content"] == (
        "<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>"
    )
    with_system = [{"role": "system", "content": "Be brief."}, *TALK[:1]]
    told = told_in_text(with_system, [{"type": "function"}], HERMES)
    assert [message["role"] for message in told] == ["system", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n# Tools")
    assert for_template(template, TALK[:1], None) == (TALK[:1], None)
