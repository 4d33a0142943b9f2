"""The language of answers whose calls have to be right: a Lark grammar in llguidance's dialect.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md: `%json` takes a schema, `<[5]>` is the token 5,
and a `[lazy]` rule ends at the first place where it can, so that text ends where a call begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miaotui.model.tokenizer import Tokenizer
from miaotui.serve.openai.tool_calls.formats import MARKS, PYTHON_TAG, Format

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes, and so templates: and no model can fill an answer with white space."""

_ANY_TEXT = "TEXT: /(.|\\n)*/"
_NO_BRACE = "TEXT: /[ \\t\\r\\n]*([^ \\t\\r\\n{](.|\\n)*)?/"


@dataclass(frozen=True)
class Signature:
    """A function's name, and the JSON schema of its arguments."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class CallLanguage:
    """Answers in `form` that call these functions; `several` calls or one."""

    form: Format
    functions: Sequence[Signature]
    several: bool
    tokenizer: Tokenizer

    def only_calls(self) -> str:
        """Answers that are calls and nothing else."""
        return self._grammar(f"start: {self._all_calls(self.form.opens)}")

    def calls_or(self, schema: Mapping[str, Any]) -> str:
        """Answers that are calls, or JSON of a schema. Calls that are JSON themselves come after a mark here."""
        start = f"start: answer | {self._all_calls(self.form.opens if self.form.mark else PYTHON_TAG)}"
        return self._grammar(start, f"answer: %json {json.dumps(schema)}")

    def calls_in_text(self) -> str:
        """Answers that are text, calls, or both."""
        form = self.form
        if not form.mark:
            return self._grammar(f"start: TEXT | {self._all_calls('')}", _NO_BRACE)
        mark = self._text(form.mark)
        spoken = f"spoken: TEXT {mark}" if mark.startswith("<[") else f"spoken[lazy]: TEXT {mark}"
        if form.opens:
            unit, beheaded = self._all_calls(form.opens.removeprefix(form.mark)), ""
        else:
            unit, beheaded = "call", form.mark
        start = f"start: (spoken {unit})* TEXT" if self.several and not form.opens else f"start: TEXT | spoken {unit}"
        return self._grammar(start, _ANY_TEXT, spoken, beheaded=beheaded)

    def _all_calls(self, opens: str) -> str:
        more = f"({self._text(self.form.between)} call)*" if self.several else ""
        return " ".join(filter(None, (self._text(opens), "call", more, self._text(self.form.closes))))

    def _grammar(self, *rules: str, beheaded: str = "") -> str:
        """The rules, with those of a call; `beheaded` is what of a call's beginning the caller has read."""
        names = [f"call_{i}" for i in range(len(self.functions))]
        lines = ["%llguidance {}", *rules, f"call: {' | '.join(names)}"]
        for i, function in enumerate(self.functions):
            before, after = self.form.around(function.name)
            parts = (self._text(before.removeprefix(beheaded)), f"arguments_{i}", self._text(after))
            schema = {**function.schema, "x-guidance": _SPACING}
            lines += [f"call_{i}: {' '.join(filter(None, parts))}", f"arguments_{i}: %json {json.dumps(schema)}"]
        return "\n".join(lines)

    def _text(self, text: str) -> str:
        """A text as Lark has it; marks that are special tokens of this model as those tokens."""
        pieces = re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text)
        return " ".join(self._piece(piece) for piece in pieces if piece)

    def _piece(self, piece: str) -> str:
        token = self.tokenizer.id_of(piece) if piece in MARKS else None
        if token is not None and token in self.tokenizer.special_ids:
            return f"<[{token}]>"
        return json.dumps(piece, ensure_ascii=False)
