"""JSON followed character by character, so that it can be passed on before it is complete."""

from __future__ import annotations

import json
import re
from enum import Enum, auto

SPACE = " \t\n\r"

_LONGEST_SCALAR = 256
_SCALAR_START = "-0123456789tfn"
_SCALAR = frozenset("0123456789+-.eE" + "truefalsn")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_SO_FAR = re.compile(r"-?|-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?[eE][+-]?[0-9]*")
_WORDS = ("true", "false", "null")
_HEX = frozenset("0123456789abcdefABCDEF")


class Malformed(Exception):
    """The text is not what it began as."""


class StringText:
    """A JSON string after its opening quote. A raw control character, which JSON forbids, is passed on escaped."""

    def __init__(self) -> None:
        self._escape = ""
        self.done = False

    def take(self, char: str) -> str:
        """The text that `char` makes certain: an escape comes out whole. Raises Malformed."""
        if self._escape:
            return self._escaped(char)
        if char == "\\":
            self._escape = char
            return ""
        if char == '"':
            self.done = True
        elif char < " ":
            return json.dumps(char)[1:-1]
        return char

    def _escaped(self, char: str) -> str:
        first = len(self._escape) == 1
        if char not in ('"\\/bfnrtu' if first else _HEX):
            raise Malformed
        self._escape += char
        if (first and char == "u") or 2 < len(self._escape) < 6:
            return ""
        escape, self._escape = self._escape, ""
        return escape


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()


class ObjectText:
    """A JSON object after its opening brace. `done` with the brace that closes it."""

    def __init__(self) -> None:
        self._open = ["{"]
        self._expect = _Expect.KEY_OR_END
        self._string: StringText | None = None
        self._scalar = ""
        self.done = False

    def take(self, char: str) -> str:
        """The text that `char` makes certain, to be passed on. Raises Malformed, also for the end of the text, ""."""
        if not char:
            raise Malformed
        if self._string is not None:
            text = self._string.take(char)
            if self._string.done:
                self._string = None
            return text
        if self._scalar and char in _SCALAR:
            self._grow(char)
            return char
        if self._scalar and not (self._scalar in _WORDS or _NUMBER.fullmatch(self._scalar)):
            raise Malformed
        self._scalar = ""
        if char not in SPACE:
            self._structure(char)
        return char

    def _grow(self, char: str) -> None:
        self._scalar += char
        word = any(word.startswith(self._scalar) for word in _WORDS)
        if len(self._scalar) > _LONGEST_SCALAR or not (word or _NUMBER_SO_FAR.fullmatch(self._scalar)):
            raise Malformed

    def _structure(self, char: str) -> None:
        expect = self._expect
        if char in "}]" and expect in (_Expect.COMMA_OR_END, _Expect.KEY_OR_END, _Expect.VALUE_OR_END):
            self._close(char)
        elif expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._value(char)
        elif expect in (_Expect.KEY, _Expect.KEY_OR_END) and char == '"':
            self._string, self._expect = StringText(), _Expect.COLON
        elif expect is _Expect.COLON and char == ":":
            self._expect = _Expect.VALUE
        elif expect is _Expect.COMMA_OR_END and char == ",":
            self._expect = _Expect.KEY if self._open[-1] == "{" else _Expect.VALUE
        else:
            raise Malformed

    def _value(self, char: str) -> None:
        self._expect = _Expect.COMMA_OR_END
        if char == '"':
            self._string = StringText()
        elif char in "{[":
            self._open.append(char)
            self._expect = _Expect.KEY_OR_END if char == "{" else _Expect.VALUE_OR_END
        elif char in _SCALAR_START:
            self._scalar = char
        else:
            raise Malformed

    def _close(self, char: str) -> None:
        if self._open.pop() + char not in ("{}", "[]"):
            raise Malformed
        self._expect = _Expect.COMMA_OR_END
        self.done = not self._open


def unquoted(raw: str) -> str:
    """The text of a JSON string, given with its quotes. Raises Malformed where it is no Unicode."""
    text: str = json.loads(raw)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed from None
    return text


def whole_object(text: str) -> str:
    """A text that is one JSON object and nothing else, as it may be passed on. Raises Malformed."""
    text = text.strip(SPACE)
    if not text.startswith("{"):
        raise Malformed
    following, parts = ObjectText(), ["{"]
    for char in text[1:]:
        if following.done:
            raise Malformed
        parts.append(following.take(char))
    if not following.done:
        raise Malformed
    return "".join(parts)
