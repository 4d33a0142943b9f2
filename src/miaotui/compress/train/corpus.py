"""Texts as windows of tokens: read, cleaned and tokenised once, into a file that training maps into memory.

The documents are laid end to end, with the end of text between them where the tokenizer has one and an empty line
where it has none, and cut into windows; a window begins with BOS where the tokenizer itself puts one before a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.write import atomic_file
from miaotui.compress.text.data import clean
from miaotui.compress.text.sources import Fault, Row, prose, prose_name, rows
from miaotui.errors import RequestError, UsageError
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer

Ids = NDArray[np.int32]

NAMED_FAULTS = 5
HELD_AT_MOST = 64
"""Windows of one task: more would cost more time than what they tell is worth."""


@dataclass
class Counts:
    """documents: read, of which `empty` and `duplicates` were dropped; `malformed` rows are not among them."""

    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    malformed: int = 0
    faults: list[str] = field(default_factory=list)

    def faulty(self, fault: Fault) -> None:
        self.malformed += 1
        if len(self.faults) < NAMED_FAULTS:
            self.faults.append(str(fault))


@dataclass(frozen=True, eq=False)
class Corpus:
    """One task's windows `[windows, window]` int32, mapped from a file; which are trained on, which are held out."""

    name: str
    windows: Ids
    train: NDArray[np.int64]
    held: NDArray[np.int64]
    counts: Counts
    fingerprint: str

    def report(self) -> dict[str, Any]:
        shown = {"source": self.name, "windows": len(self.train), "held_out": len(self.held)}
        return {**shown, "fingerprint": self.fingerprint, **vars(self.counts)}


@dataclass(frozen=True, eq=False)
class Texts:
    """How texts become tokens: a model's tokenizer, its chat template if any, and the window."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    window: int

    @property
    def head(self) -> list[int]:
        """What every window begins with."""
        tokenizer = self.tokenizer
        return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []

    def corpus(self, source: str | None, file: Path, share: float, seed: int) -> Corpus:
        """The windows of a source, written to `file`; `share` of them are held out, drawn by the seed.

        Memory: a document. Raises UsageError for a source that cannot be read, and for too little text, with what is
        wrong with its malformed rows.
        """
        counts, digest, written = Counts(), hashlib.sha256(), 0
        with atomic_file(file) as out:
            for window in self._windows(self._documents(source, counts)):
                out.write(window.tobytes())
                digest.update(window.tobytes())
                written += 1
        name = prose_name() if source is None else source
        held = 0 if not share else min(HELD_AT_MOST, max(1, round(share * written)))
        if written <= held:
            raise _too_little(name, self.window, written, counts)
        windows = np.memmap(file, dtype="<i4", mode="r", shape=(written, self.window))
        order = np.random.default_rng([seed, 1]).permutation(written)
        return Corpus(name, windows, np.sort(order[held:]), np.sort(order[:held]), counts, digest.hexdigest()[:16])

    def _windows(self, documents: Iterator[list[int]]) -> Iterator[Ids]:
        head = np.array(self.head, "<i4")
        room, rest = self.window - len(head), np.empty(0, "<i4")
        for ids in documents:
            rest = np.concatenate([rest, np.array(ids, "<i4")])
            while len(rest) >= room:
                yield np.concatenate([head, rest[:room]])
                rest = rest[room:]

    def _documents(self, source: str | None, counts: Counts) -> Iterator[list[int]]:
        """Ids of each document, cleaned, none empty, each once; what stands between two goes before the second."""
        between = list(self.tokenizer.eos_ids[:1]) or self._encode("\n\n")
        found = prose() if source is None else rows(Path(source).expanduser(), counts.faulty)
        seen: set[bytes] = set()
        ended = True
        for row in found:
            counts.documents += 1
            content = _content(row)
            key = hashlib.blake2b(content.encode(), digest_size=16).digest()
            if not content.strip():
                counts.empty += 1
            elif key in seen:
                counts.duplicates += 1
            else:
                seen.add(key)
                ids = self._ids(row, counts)
                if ids:
                    yield ids if ended or row.continues else between + ids
                    ended = ids[-1] in self.tokenizer.eos_ids

    def _ids(self, row: Row, counts: Counts) -> list[int]:
        """Ids of one row; none, and one more malformed row, where the chat template refuses it."""
        if row.messages is None:
            return self._encode(_content(row))
        if self.chat_template is None:
            raise UsageError(
                f"{row.where} is a conversation, and the model has no chat template.",
                "Give rows of text, or a model with a chat template.",
            )
        try:
            ids = self.chat_template.encode(_cleaned(row).messages or [], add_generation_prompt=False)
        except RequestError as error:
            counts.documents -= 1
            counts.faulty(Fault(row.where, error.message.rstrip(".")))
            return []
        return ids[1:] if self.head and ids[:1] == self.head else ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def _content(row: Row) -> str:
    return clean(row.whole) if row.messages is None else repr(_cleaned(row).messages)


def _cleaned(row: Row) -> Row:
    messages = [
        {**message, "content": clean(message["content"])} if isinstance(message.get("content"), str) else message
        for message in row.messages or []
    ]
    return replace(row, messages=messages)


def _too_little(name: str, window: int, windows: int, counts: Counts) -> UsageError:
    faults = f" ({counts.malformed} malformed rows, the first: {counts.faults[0]})" if counts.malformed else ""
    return UsageError(
        f"{name} gives {windows} window{'' if windows == 1 else 's'} of {window} tokens{faults}.",
        "Give more text, a shorter --window, or --held-out 0.",
    )
