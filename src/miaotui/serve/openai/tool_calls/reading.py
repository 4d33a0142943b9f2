"""Reading an answer character by character: what is text is told, what may become a call is held."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator
from itertools import groupby
from typing import TypeVar

from miaotui.serve.openai.tool_calls.deltas import CallArguments, CallBegins, Content, Delta
from miaotui.serve.openai.tool_calls.json_text import SPACE, Malformed, ObjectText, StringText, unquoted, whole_object

T = TypeVar("T")
Reader = Generator[None, str, T]
"""Is sent one character after the other, and at the end "". Raises Malformed where the text breaks its rules."""

_ARGUMENTS = ("arguments", "parameters")
_PASSED_OVER = ("id", "type")


class Reading:
    """An answer on its way through a format's reader.

    Every character is `held` until it is told: as text, or as part of a call. A call is told from the moment its name
    is known and its arguments have begun; what breaks the rules before then comes out as the text that it is, and so
    does what comes after a break in the arguments. Only the marks around a call, and white space beside it, are told
    to nobody.
    """

    def __init__(self, names: Collection[str], new_id: Callable[[], str]) -> None:
        """`names` of the functions on offer; a call of another is no call."""
        self._told: list[Delta] = []
        self.held: list[str] = []
        self.calls = 0
        self.spoken = False
        self.searching = ""
        """The mark that is looked for while nothing is held; "" within a call."""
        self.suspect = False
        """Whether what is held begins with a mark."""
        self._after_call = False
        self._space = ""
        self._names = names
        self._new_id = new_id

    @property
    def fresh(self) -> bool:
        """Whether nothing but white space has come."""
        return not self.spoken and not self.calls

    # -- telling -------------------------------------------------------------------------------------------
    def say(self, text: str) -> None:
        """Tell text. White space at its end waits: beside a call it is no part of the text."""
        body = text.rstrip(SPACE)
        if body:
            lead = "" if self.calls and not self.spoken else self._space
            if self.calls and not self.spoken:
                body = body.lstrip(SPACE)
            self._space = ""
            self.spoken, self._after_call = True, False
            self._told.append(Content(lead + body))
        self._space += text[len(text.rstrip(SPACE)) :]

    def say_rest(self) -> None:
        """Tell what waits, at the end of the text."""
        if self._space and not self._after_call:
            self._told.append(Content(self._space))
        self._space = ""

    def settle(self) -> None:
        """What is held has done its duty as a call's marks."""
        self.held.clear()
        self.suspect = False

    def begin(self, name: str) -> None:
        self._space = ""
        self._after_call = True
        self._told.append(CallBegins(self.calls, self._new_id(), name))
        self.calls += 1
        self.settle()

    def argue(self, text: str) -> None:
        if text:
            self._told.append(CallArguments(self.calls - 1, text))
            self.settle()

    def take(self) -> list[Delta]:
        """What has been told since the last time, neighbours of a kind as one."""
        told, self._told = self._told, []
        deltas: list[Delta] = []
        for kind, group in groupby(told, key=lambda delta: (type(delta), getattr(delta, "index", 0))):
            if kind[0] is CallBegins:
                deltas += group
            elif kind[0] is Content:
                deltas.append(Content("".join(delta.text for delta in group if isinstance(delta, Content))))
            else:
                text = "".join(delta.text for delta in group if isinstance(delta, CallArguments))
                deltas.append(CallArguments(kind[1], text))
        return deltas

    # -- reading -------------------------------------------------------------------------------------------
    def next(self) -> Reader[str]:
        char = yield
        self.held.append(char)
        return char

    def next_solid(self) -> Reader[str]:
        """The next character that is no white space."""
        while True:
            char = yield from self.next()
            if not char or char not in SPACE:
                return char

    def until(self, mark: str, *, brace: bool = False) -> Reader[str]:
        """Say text up to `mark`, or up to a brace that the answer begins with; which of them, "" at the end."""
        while True:
            if not self.held:
                self.searching = mark
            char = yield from self.next()
            self.searching = ""
            if not char:
                self.say("".join(self.held))
                self.settle()
                return ""
            if brace and char == "{" and self.fresh and len(self.held) == 1:
                self.suspect = True
                return char
            while self.held and not mark.startswith("".join(self.held)):
                self.say(self.held.pop(0))
            if len(self.held) == len(mark):
                self.suspect = True
                return mark

    def literal(self, text: str, first: str) -> Reader[None]:
        """`text`, whose first character has been read. The end of the answer may cut it."""
        char = first
        for i, wanted in enumerate(text):
            if i:
                char = yield from self.next()
            if not char:
                break
            if char != wanted:
                raise Malformed
        self.settle()

    def string(self, first: str) -> Reader[str]:
        """The text of a JSON string; `first` should be its quote."""
        if first != '"':
            raise Malformed
        following, parts = StringText(), ['"']
        while not following.done:
            char = yield from self.next()
            if not char:
                raise Malformed
            parts.append(following.take(char))
        return unquoted("".join(parts))

    def tell_object(self) -> Reader[None]:
        """Tell arguments, after their brace, as they come."""
        following = ObjectText()
        self.argue("{")
        while not following.done:
            char = yield from self.next()
            self.argue(following.take(char))

    def hold_arguments(self, first: str) -> Reader[str]:
        """Arguments that cannot be told yet, or that are an object's text in a string."""
        if first == '"':
            return whole_object((yield from self.string(first)))
        if first != "{":
            raise Malformed
        following, parts = ObjectText(), [first]
        while not following.done:
            char = yield from self.next()
            parts.append(following.take(char))
        return "".join(parts)

    def known(self, name: str) -> str:
        if name not in self._names:
            raise Malformed
        return name

    def call_object(self, *, complete: bool = False) -> Reader[None]:
        """A call as an object with `name` and `arguments`, after its brace.

        `complete`: both have to be there; otherwise no arguments are empty ones.
        """
        name, arguments, told = "", "", False
        seen: set[str] = set()
        char = yield from self.next_solid()
        while True:
            key = yield from self._key(char)
            char = yield from self.next_solid()
            kind = "arguments" if key in _ARGUMENTS else key
            if kind in seen:
                raise Malformed
            seen.add(kind)
            if kind == "name":
                name = self.known((yield from self.string(char)))
            elif kind == "arguments" and name and char == "{":
                self.begin(name)
                told = True
                yield from self.tell_object()
            elif kind == "arguments":
                arguments = yield from self.hold_arguments(char)
            elif kind in _PASSED_OVER:
                yield from self.string(char)
            else:
                raise Malformed
            char = yield from self.next_solid()
            if char == "}":
                break
            if char != ",":
                raise Malformed
            char = yield from self.next_solid()
        if not told:
            if not name or (complete and not arguments):
                raise Malformed
            self.begin(name)
            self.argue(arguments or "{}")
        self.settle()

    def _key(self, first: str) -> Reader[str]:
        key = yield from self.string(first)
        if (yield from self.next_solid()) != ":":
            raise Malformed
        return key

    def call_objects(self, first: str) -> Reader[None]:
        """One call as an object, or several in a list."""
        if first == "{":
            yield from self.call_object()
            return
        if first != "[":
            raise Malformed
        while True:
            if (yield from self.next_solid()) != "{":
                raise Malformed
            yield from self.call_object()
            char = yield from self.next_solid()
            if not char or char == "]":
                self.settle()
                return
            if char != ",":
                raise Malformed


class ToolCallStream:
    """Tells an answer's text and calls as they come. What all deltas add up to does not depend on the pieces."""

    def __init__(
        self, read: Callable[[Reading], Reader[None]], names: Collection[str], new_id: Callable[[], str]
    ) -> None:
        """`read` is a format's reader (formats.py); `new_id` gives a call's id."""
        self._read = read
        self._reading = Reading(names, new_id)
        self._restart()

    def push(self, text: str) -> list[Delta]:
        """The deltas that this piece of the answer makes certain."""
        self._feed(deque([text]))
        return self._reading.take()

    def finish(self) -> list[Delta]:
        """The rest, once no text will follow."""
        while not self._send(""):
            self._feed(deque([self._give_back()]))
        self._reading.say_rest()
        return self._reading.take()

    def _feed(self, todo: deque[str]) -> None:
        """Send pieces of text, a character at a time where it matters."""
        reading = self._reading
        while todo:
            text, position = todo.popleft(), 0
            while position < len(text):
                if reading.searching:
                    position = self._skim(text, position)
                    if position == len(text):
                        break
                sent, position = text[position], position + 1
                if not self._send(sent):
                    todo.appendleft(text[position:])
                    todo.appendleft(self._give_back())
                    break

    def _skim(self, text: str, position: int) -> int:
        """Say all text that cannot begin a call; where that ends."""
        reading = self._reading
        if reading.fresh:
            return position
        found = text.find(reading.searching[0], position)
        end = len(text) if found < 0 else found
        reading.say(text[position:end])
        return end

    def _send(self, char: str) -> bool:
        """Whether the reader takes it."""
        try:
            self._reader.send(char)
        except StopIteration:
            return True
        except Malformed:
            return False
        return True

    def _give_back(self) -> str:
        """What was no call, to be read again. The mark before it is text: its first character is said."""
        held, said = "".join(self._reading.held), int(self._reading.suspect)
        self._restart()
        self._reading.say(held[:said])
        return held[said:]

    def _restart(self) -> None:
        self._reading.settle()
        self._reader = self._read(self._reading)
        next(self._reader)
