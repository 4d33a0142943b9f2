"""The sandbox chat templates run in: transformers' Jinja dialect, with bounds on what a template may consume.

Templates come with models, so they are code of strangers: the environment is Jinja's immutable sandbox (no private
attributes, no changing of arguments), loops share one budget of steps and strings have a largest length, so that a
template that never ends or doubles a string for ever is stopped with an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from miaotui.model.special_text import BEGIN, END

MAX_STEPS = 1_000_000
"""Loop iterations one rendering may take, all loops together."""

MAX_CHARS = 64 << 20
"""Characters one rendering may produce, and the longest string a template may build on its way."""

_BUDGET = "_steps"
_ESCAPED_BEGIN, _ESCAPED_END = (json.dumps(mark)[1:-1] for mark in (BEGIN, END))


class LimitError(Exception):
    """A template used more than it may."""


class _Budget:
    """Steps left to one rendering."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise LimitError(f"it took more than {MAX_STEPS:,} loop steps")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is its content, in a scope."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Bounds(NodeTransformer):
    """Routes every loop's iterable and every `~` through a checked filter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_concatenated", [], [], None, None, lineno=node.lineno)


class _Namespace(Namespace):
    """`namespace()` without underscore names, which would reach the interpreter's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # Jinja's signature, so that `namespace(self=…)` works
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the namespace attribute {name!r} begins with an underscore")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters.update(tojson=_tojson, _counted=_counted, _concatenated=_concatenated)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounds().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check_length(_length(left) + _length(right))
        elif operator == "*":
            times = next((x for x in (left, right) if isinstance(x, int)), 1)
            _check_length(max(_length(left), _length(right)) * times)
        elif isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)


def compile_template(source: str) -> jinja2.Template:
    """A template ready to render. Raises jinja2.TemplateSyntaxError."""
    return _Environment().from_string(source)


def render_bounded(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The template's output; raises LimitError where it exceeds the bounds, jinja2.TemplateError where it fails."""
    parts: list[str] = []
    total = 0
    for part in template.generate({**variables, _BUDGET: _Budget()}):
        total += len(part)
        _check_length(total)
        parts.append(part)
    return "".join(parts)


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = context.resolve(_BUDGET)
    for item in items:
        budget.spend()
        yield item


@jinja2.pass_context  # keeps the compiler from folding it
def _concatenated(_context: jinja2.runtime.Context, parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_length(length: int) -> None:
    if length > MAX_CHARS:
        raise LimitError(f"it built more than {MAX_CHARS:,} characters")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, not Jinja's, which escapes `<`, `>`, `&` and `'` for HTML; marks on user text stay unescaped."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(_ESCAPED_BEGIN, BEGIN).replace(_ESCAPED_END, END) if ensure_ascii else text
