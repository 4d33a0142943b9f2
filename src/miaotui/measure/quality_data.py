"""Text to measure quality on, and how it is cut into windows of tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.errors import UsageError
from miaotui.model.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Document = str | Messages
Ids = NDArray[np.int32]

CHARACTERS_PER_TOKEN = 8
"""A first guess, on the safe side, of how much text a number of tokens needs."""
CUT_MARGIN = 64
"""Tokens before a cut in a text that the cut may have changed."""


@dataclass(frozen=True)
class Data:
    """Documents in their order, and the name to report them by."""

    name: str
    documents: Sequence[Document]


@dataclass(frozen=True, eq=False)
class Window:
    """A run of tokens; those from index `first` on are scored, each given all before it."""

    tokens: Ids
    first: int = 1

    @property
    def targets(self) -> Ids:
        return self.tokens[self.first :]


@dataclass(frozen=True)
class Cut:
    """How to cut: windows of `size` tokens, BOS counted, every `stride` tokens of the data (None: end to end).

    With a stride shorter than the window, a token is scored once, in the first window that holds it.
    """

    size: int = 1024
    stride: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UsageError(f"A window of {self.size} tokens predicts nothing.", "Give --window at least 2.")
        if self.stride is not None and not 1 <= self.stride <= self.size:
            raise UsageError(
                f"The stride is {self.stride} and the window {self.size}.", "Give --stride from 1 to the window."
            )
        if self.most is not None and self.most < 1:
            raise UsageError(f"max_windows is {self.most}.", "Give at least 1.")


# -- reading ---------------------------------------------------------------------------------------------
def read_data(source: str | None) -> Data:
    """The documents of a text file, of JSON lines with `text` or `messages`, of stdin (`-`), or the default.

    None is the English prose that CPython carries (`pydoc_data.topics`): the same for everyone with the same Python.
    A file is JSON lines when its name ends so or its first line is an object with one of those fields.
    Raises UsageError for what cannot be read, is not UTF-8, holds nothing, or has a line of another shape.
    """
    if source is None:
        return Data(f"pydoc_data.topics of Python {sys.version_info.major}.{sys.version_info.minor}", [_prose()])
    name = "stdin" if source == "-" else source
    text = _decoded(_bytes(source), name)
    if source.endswith((".jsonl", ".ndjson")) or _is_json_line(text.lstrip().partition("\n")[0]):
        documents = [_document(line, at, name) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        documents = [text]
    if not any(documents):
        raise UsageError(f"{name} holds no text.", "Give a file with some prose in it, or leave --data out.")
    return Data(name, documents)


def _prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _bytes(source: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        cause = f"{source} cannot be read: {error.strerror}."
        raise UsageError(cause, "Give --data a text file, a .jsonl file, or - for stdin.") from error


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 (byte {error.start}).", "Convert it: iconv -f <its encoding> -t UTF-8 FILE."
        ) from error


def _is_json_line(line: str) -> bool:
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return False
    return isinstance(found, dict) and bool({"text", "messages"} & set(found))


def _document(line: str, number: int, name: str) -> Document:
    """One line of JSON lines. Raises UsageError that names the line."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UsageError(
            f"{name}, line {number}, is not JSON: {error}.", "Give one JSON object on each line."
        ) from error
    if isinstance(found, dict):
        text, messages = found.get("text"), found.get("messages")
        if isinstance(text, str):
            return text
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            return messages
    raise UsageError(
        f"{name}, line {number}, has neither text nor messages.",
        'Give lines such as {"text": "…"} or {"messages": [{"role": "user", "content": "…"}]}.',
    )


# -- cutting ---------------------------------------------------------------------------------------------
def cut_windows(
    data: Data, cut: Cut, tokenizer: Tokenizer, render: Callable[[Messages], list[int]]
) -> tuple[list[Window], list[str]]:
    """The windows of `data`, and what is to be said about them. `render` gives the tokens of a conversation.

    Every window begins with BOS where the tokenizer itself puts one; tokens that do not fill a last window are left
    out, unless they are all there is. Texts of JSON lines are joined by an empty line. Raises UsageError when there
    are too few tokens to predict any.
    """
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    room = cut.size - len(bos)
    step = min(cut.stride or room, room)
    wanted = None if cut.most is None else room + step * (cut.most - 1)
    tokens = np.fromiter(_tokens(data, tokenizer, render, wanted), dtype=np.int32)
    if len(bos) + len(tokens) < 2:
        raise UsageError(f"{data.name} holds {len(tokens)} tokens.", "Give at least one that follows another.")
    notes = []
    if len(tokens) < room:
        notes.append(f"{data.name} holds {len(tokens)} tokens, less than a window: measured as one short window.")
        room = len(tokens)
    starts = range(0, len(tokens) - room + 1, step)[: cut.most]
    head = np.array(bos, dtype=np.int32)
    windows = [
        Window(np.concatenate([head, tokens[at : at + room]]), max(1, len(bos) + room - step) if at else 1)
        for at in starts
    ]
    return windows, notes


def _tokens(
    data: Data, tokenizer: Tokenizer, render: Callable[[Messages], list[int]], wanted: int | None
) -> Iterator[int]:
    """Ids of the data, at least `wanted` of them where there are as many; None: all."""
    count = 0
    for is_text, documents in groupby(data.documents, key=lambda document: isinstance(document, str)):
        pieces: Iterable[list[int]]
        if is_text:
            pieces = [_encode(tokenizer, "\n\n".join(map(str, documents)), wanted)]
        else:
            pieces = (render(messages) for messages in documents if not isinstance(messages, str))
        for ids in pieces:
            yield from ids
            count += len(ids)
            if wanted is not None and count >= wanted:
                return


def _encode(tokenizer: Tokenizer, text: str, wanted: int | None) -> list[int]:
    """Ids of `text`, or of so much of it that the first `wanted` are those of the whole.

    As in transformers, the text of a special token is that token.
    """
    length = len(text) if wanted is None else CHARACTERS_PER_TOKEN * (wanted + CUT_MARGIN)
    while True:
        ids = tokenizer.encode(text[:length], add_special_tokens=False, parse_special=True)
        if wanted is None or length >= len(text):
            return ids
        if len(ids) >= wanted + CUT_MARGIN:
            return ids[:wanted]
        length *= 2
