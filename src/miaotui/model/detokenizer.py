"""Text out of a growing token sequence, and the watch for stop strings in it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from miaotui.errors import RequestError
from miaotui.model.token_text import SPACE, Joining, byte_fallback_piece

if TYPE_CHECKING:
    from miaotui.model.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class _Joiner(Protocol):
    """Joins tokens to finished text; `push` keeps back what later tokens may still change."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None: ...

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class IncrementalDetokenizer:
    """Turns ids into text as they come.

    `push` returns text that is final: never half a character, never a replacement character that a later token
    would have completed. All pushes and the `flush` joined equal `tokenizer.decode` of all ids, however they are
    cut. About a microsecond per token. `flush` ends the text; the next push begins a new one.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        joiners: dict[Joining, type[_Joiner]] = {
            Joining.BYTE_LEVEL: _ByteLevel,
            Joining.BYTE_FALLBACK: _Pieces,
            Joining.METASPACE: _Pieces,
            Joining.OTHER: _Windowed,
        }
        self._joiner = joiners[tokenizer.decoder_kind.joining](tokenizer, skip_special_tokens)

    def push(self, ids: Sequence[int]) -> str:
        """Text finished by these ids, "" while a character is incomplete."""
        return self._joiner.push(ids)

    def flush(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD."""
        return self._joiner.flush()


class _ByteTable(dict[int, bytes]):
    """Raw bytes by id, filled as ids occur; a skipped special token has none."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()

    def __missing__(self, token_id: int) -> bytes:
        found = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        self[token_id] = found
        return found


class _ByteLevel:
    """Byte-level vocabularies: one byte stream through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._table = _ByteTable(tokenizer, skip_special)
        self._utf8 = _UTF8("replace")

    def push(self, ids: Sequence[int]) -> str:
        table = self._table
        return self._utf8.decode(b"".join([table[i] for i in ids]))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        return rest


class _PieceTable(dict[int, "str | int | None"]):
    """By id, filled as ids occur: text, a byte's value, or None for what adds nothing; Metaspace keeps its `▁`."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        super().__init__()
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._bytes = tokenizer.decoder_kind.joining is Joining.BYTE_FALLBACK

    def __missing__(self, token_id: int) -> str | int | None:
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        piece = byte_fallback_piece(token) if self._bytes and token is not None else token
        self[token_id] = piece
        return piece


class _Pieces:
    """SentencePiece vocabularies: text pieces, with byte tokens held until their run ends.

    A run has to be held whole because the decoder judges it whole: one bad byte makes every byte of the run a
    U+FFFD, also those that would have been characters.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._table = _PieceTable(tokenizer, skip_special)
        self._kind = tokenizer.decoder_kind
        self._run = bytearray()
        self._at_start = True

    def push(self, ids: Sequence[int]) -> str:
        table, parts = self._table, []
        for token_id in ids:
            piece = table[token_id]
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece is not None:
                if self._run:
                    parts.append(self._close_run())
                parts.append(self._first(piece) if self._at_start else piece)
        text = "".join(parts)
        return text.replace(SPACE, " ") if self._kind.joining is Joining.METASPACE else text

    def flush(self) -> str:
        rest = self._close_run() if self._run else ""
        self._at_start = True
        return rest

    def _close_run(self) -> str:
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return self._first(text) if self._at_start else text

    def _first(self, piece: str) -> str:
        """The first text: without its leading space where the decoder strips one (Metaspace: all of the token's)."""
        if self._kind.joining is Joining.METASPACE:
            self._at_start = False
            return piece.replace(SPACE, "") if self._kind.strip_first else piece
        if not piece:
            return ""
        self._at_start = False
        return piece[1:] if self._kind.strip_first and piece[0] == " " else piece


class _Windowed:
    """Any other decoder: what the newest ids add to a window of the ones just before, by decoding both."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._window: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        self._pending.extend(ids)
        added = self._added()
        if not added or added.endswith("\ufffd"):
            return ""
        self._window, self._pending = self._pending, []
        return added

    def flush(self) -> str:
        added = self._added()
        self._window, self._pending = [], []
        return added

    def _added(self) -> str:
        before = self._tokenizer.decode(self._window, self._skip)
        return self._tokenizer.decode(self._window + self._pending, self._skip)[len(before) :]


class Checked(NamedTuple):
    """Text that may be sent now, and the stop string that ended it, if one did."""

    text: str
    stop: str | None


class StopChecker:
    """Looks for stop strings in text that comes in pieces.

    The stop that is complete first wins, the longest of those that end together; so the answer does not depend on
    how the text was cut. A suffix that may become a stop is held back until it is known.
    """

    def __init__(self, stops: Iterable[str], include_stop_str_in_output: bool = False) -> None:
        self._stops = list(dict.fromkeys(stops))
        if "" in self._stops:
            raise RequestError("A stop string is empty.", "Leave it out.", param="stop")
        self._include = include_stop_str_in_output
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> Checked:
        """Take newly finished text; after a stop was returned nothing more may be pushed."""
        if not self._stops:
            return Checked(text, None)
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at, stop = min(found)
            self._held = ""
            return Checked(text[: end if self._include else at], stop)
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return Checked(text[: len(text) - keep], None)

    def flush(self) -> str:
        """The held text, when generation ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
