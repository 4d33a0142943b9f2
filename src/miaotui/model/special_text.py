"""Telling the special tokens a chat template writes from their text in what a user wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from miaotui.errors import RequestError

if TYPE_CHECKING:
    import tokenizers

    from miaotui.model.tokenizer import Tokenizer

BEGIN, END = "\ufdd0", "\ufdd1"
"""Marks around special-token text of users: noncharacters, which Unicode keeps for a program's own use."""

_ANCHOR = "\ufdd2"
_NO_RESERVED = dict.fromkeys(map(ord, (BEGIN, END, _ANCHOR)))


class SpecialText:
    """Marks special-token text in a user's strings, and encodes a rendered chat so that marked text stays text.

    The marks stand around each such text (as in transformers' `sanitize_control_tokens`), so that a template still
    finds it in content it searches or splits. They are single noncharacters, which pass through what templates do
    to content (trim, JSON, case, slices); users' own ones are removed, so they cannot be forged.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = {token.content: token for token in added.values() if token.special}
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(alternatives)
        self._marked = re.compile(f"(?P<mark>[{BEGIN}{END}])|(?P<token>{alternatives})")
        self._anchors = {content: f"{_ANCHOR}{i}{_ANCHOR}" for i, content in enumerate(self._special)}

    def occurs_in(self, value: Any) -> bool:
        """Whether any string in `value` (nested lists and dicts, keys too) holds special-token text."""
        found: list[bool] = []

        def look(text: str) -> str:
            found.append(self._pattern.search(text) is not None)
            return text

        map_strings(value, look)
        return any(found)

    def mark(self, value: Any) -> Any:
        """`value` with every special-token text in its strings put between the marks."""

        def around(text: str) -> str:
            return self._pattern.sub(rf"{BEGIN}\g<0>{END}", text.translate(_NO_RESERVED))

        return map_strings(value, around)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a chat rendered from marked values: marked special-token text is encoded as the text it is.

        Each special token the template wrote is replaced by an *anchor*, an added token of a second tokenizer that
        shares the vocabulary but has no special tokens. One call then encodes the whole chat, so that text is cut
        and normalised around special tokens exactly as always, and anchors become the special ids again.
        A mark that a template separated from its token (by slicing) is dropped.
        """
        parts: list[str] = []
        position, mark_end = 0, -1
        for match in self._marked.finditer(rendered):
            parts.append(rendered[position : match.start()])
            position = match.end()
            if match["token"]:
                literal = match.start() == mark_end
                parts.append(match[0] if literal else self._anchors[match[0]])
            elif match[0] == BEGIN:
                mark_end = match.end()
        parts.append(rendered[position:])
        backend, real_ids = self._anchored
        ids = [real_ids.get(i, i) for i in backend.encode("".join(parts), add_special_tokens=False).ids]
        self._check_no_other(ids, parts)
        return ids

    def _check_no_other(self, ids: Sequence[int], parts: Sequence[str]) -> None:
        """Refuse where plain text still became a special token (a vocabulary whose merges produce one)."""
        anchors = set(self._anchors.values())
        written = sum(part in anchors for part in parts)
        unknown = self._tokenizer.backend.token_to_id(getattr(self._tokenizer.backend.model, "unk_token", None) or "")
        if sum(i in self._tokenizer.special_ids and i != unknown for i in ids) > written:
            raise RequestError(
                "A message contains the text of a special token that this tokenizer cannot keep as text.",
                "Remove the special token's text from the messages.",
                param="messages",
            )

    @cached_property
    def _anchored(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokenizer with anchors, sharing the model of the real one, and its added ids as real ids."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        real = self._tokenizer.backend
        backend = Backend(real.model)
        if real.normalizer is not None:
            backend.normalizer = real.normalizer
        if real.pre_tokenizer is not None:
            backend.pre_tokenizer = real.pre_tokenizer
        plain = [token for token in real.get_added_tokens_decoder().values() if not token.special]
        backend.add_tokens(plain)
        for content, token in self._special.items():
            flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
            backend.add_tokens([AddedToken(self._anchors[content], normalized=False, special=False, **flags)])
        pairs = [(backend.token_to_id(t.content), real.token_to_id(t.content)) for t in plain]
        pairs += [(backend.token_to_id(anchor), real.token_to_id(c)) for c, anchor in self._anchors.items()]
        return backend, {mine: theirs for mine, theirs in pairs if mine is not None and theirs is not None}


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of JSON-like data with every string changed, keys too.

    Raises RequestError for a value that is not JSON: objects would give a template methods to call.
    """
    if isinstance(value, str):
        return change(str(value))
    if isinstance(value, dict):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise RequestError(
        f"A chat message holds a {type(value).__name__}, which is not JSON.", "Pass strings, numbers, lists and dicts."
    )
