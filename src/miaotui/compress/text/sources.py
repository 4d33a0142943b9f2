"""Rows of text from files, one at a time: plain text, JSON lines, Parquet, folders of these, and a text of our own.

A row is a text, a prompt with its completion, or a conversation, by the fields that it has:

| fields | row |
|---|---|
| `messages` | a conversation: objects with `role` and `content` |
| `prompt` and `completion` | both as text; both as messages are a conversation |
| `text`, or else `content` | a text |

Memory: one row; of Parquet, a batch of them. Nothing here needs PyTorch, and only Parquet needs pyarrow.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miaotui.errors import DependencyError, UsageError

Messages = list[dict[str, Any]]

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
PLAIN = (".txt", ".md", ".rst")
FIELDS = ("messages", "prompt", "completion", "text", "content")

PIECE_BYTES = 1 << 20
"""A longer plain text comes as rows of about this size, cut at an empty line, or at any line where none comes."""
BATCH_ROWS = 256


@dataclass(frozen=True)
class Row:
    """One row. where: the file and the row in it, for people.

    text: all of it, or the prompt where there is a `completion`; empty where there are `messages`.
    continues: it goes on where the row before it ended.
    """

    where: str
    text: str = ""
    completion: str | None = None
    messages: Messages | None = None
    continues: bool = False

    @property
    def whole(self) -> str:
        """Prompt and completion, one after the other, as they are trained on."""
        return self.text + (self.completion or "")


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


Faulty = Callable[[Fault], None]


def refuse(fault: Fault) -> None:
    """Let no malformed row pass. Raises UsageError."""
    raise UsageError(f"{fault.where} cannot be used: {fault.why}.", _FIELDS_HINT)


_FIELDS_HINT = "Give rows with text, content, prompt and completion, or messages."


def rows(path: Path, faulty: Faulty = refuse) -> Iterator[Row]:
    """The rows of a file, or of all files in a folder in the order of their names.

    `faulty` is told of each malformed row, which is left out. A file is JSON lines or Parquet by its name; another
    is JSON lines when its first line is an object with one of the fields, and else one text.
    Raises UsageError for what cannot be read, for bytes that are not UTF-8, and for a folder without such files;
    DependencyError for Parquet without pyarrow.
    """
    for file in files(path):
        yield from _file_rows(file, faulty)


def files(path: Path) -> list[Path]:
    """The file itself, or those of a folder that hold text, by their names. Raises UsageError when there is none."""
    if not path.is_dir():
        return [path]
    known = (*PLAIN, *JSON_LINES, *PARQUET)
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in known
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise UsageError(f"The folder {path} holds no text.", f"Put files of these kinds in it: {', '.join(known)}.")
    return found


def _file_rows(file: Path, faulty: Faulty) -> Iterator[Row]:
    suffix = file.suffix.lower()
    try:
        if suffix in PARQUET:
            yield from _parquet_rows(file, faulty)
        elif suffix in JSON_LINES or _begins_as_json_line(file):
            yield from _json_rows(file, faulty)
        else:
            yield from _text_rows(file)
    except OSError as error:
        cause = f"{file} cannot be read: {error.strerror or error}."
        raise UsageError(cause, "Give a text file, a .jsonl or .parquet file, or a folder of these.") from error


# -- plain text ------------------------------------------------------------------------------------------
def _text_rows(file: Path) -> Iterator[Row]:
    start = 0
    for piece in _pieces(file):
        yield Row(str(file), _decoded(piece, file, start), continues=start > 0)
        start += len(piece)


def _pieces(file: Path) -> Iterator[bytes]:
    lines: list[bytes] = []
    size = 0
    with file.open("rb") as content:
        for line in content:
            lines.append(line)
            size += len(line)
            if size >= PIECE_BYTES and (not line.strip() or size >= 2 * PIECE_BYTES):
                yield b"".join(lines)
                lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _decoded(content: bytes, file: Path, start: int) -> str:
    """The text of bytes that begin at `start` of the file, without a byte order mark."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 (byte {start + error.start}).",
            "Convert it: iconv -f <its encoding> -t UTF-8 FILE.",
        ) from error
    return text.removeprefix("\ufeff") if start == 0 else text


# -- JSON lines ------------------------------------------------------------------------------------------
def _begins_as_json_line(file: Path) -> bool:
    with file.open("rb") as content:
        line = content.readline(PIECE_BYTES).removeprefix(b"\xef\xbb\xbf")
    if not line.startswith(b"{"):
        return False
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(set(FIELDS) & set(found))


def _json_rows(file: Path, faulty: Faulty) -> Iterator[Row]:
    start = 0
    with file.open("rb") as content:
        for number, line in enumerate(content, 1):
            where, text = f"{file}, line {number}", _decoded(line, file, start)
            start += len(line)
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                faulty(Fault(where, f"it is not JSON ({error})"))
                continue
            yield from _told(row_of(values, where), faulty)


# -- Parquet ---------------------------------------------------------------------------------------------
def _parquet_rows(file: Path, faulty: Faulty) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DependencyError("Parquet is read with pyarrow, which is absent.", _PYARROW_HINT) from error
    try:
        with file.open("rb") as content, parquet.ParquetFile(content) as table:
            names = table.schema_arrow.names
            columns = [name for name in FIELDS if name in names]
            if not columns:
                cause = f"{file} has only the columns {', '.join(names)}."
                raise UsageError(cause, f"Rename one of them to {', '.join(FIELDS)}.")
            number = 0
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for values in _plain_rows(batch, file, number):
                    number += 1
                    yield from _told(row_of(values, f"{file}, row {number}"), faulty)
    except pa.ArrowException as error:
        cause = f"{file} cannot be read: {str(error).splitlines()[0]}"
        raise UsageError(f"{cause.rstrip('.')}.", "Write it again, or give text or JSON lines.") from error


_PYARROW_HINT = "Install it: pip install 'miaotui[compress]', or give JSON lines."


def _plain_rows(batch: Any, file: Path, before: int) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        place = f"byte {error.start} of a text in rows {before + 1} to {before + batch.num_rows}"
        raise UsageError(f"{file} is not UTF-8 ({place}).", "Write its texts as UTF-8.") from error
    return found


# -- one row ---------------------------------------------------------------------------------------------
def _told(row: Row | Fault, faulty: Faulty) -> Iterator[Row]:
    if isinstance(row, Row):
        yield row
    else:
        faulty(row)


def row_of(values: Any, where: str) -> Row | Fault:
    """The row of an object with the fields above, or what is wrong with it. A field that is null counts as absent."""
    if not isinstance(values, Mapping):
        return Fault(where, f"it is a {_kind(values)}, not an object")
    given = {name: values[name] for name in FIELDS if values.get(name) is not None}
    for name in ("messages", "prompt", "text", "content"):
        if name in given and (name != "prompt" or "completion" in given):
            parts = [name, "completion"] if name == "prompt" else [name]
            return _row_of([(part, given[part]) for part in parts], where)
    named = ", ".join(map(str, values)) or "nothing"
    return Fault(where, f"it has neither text nor messages, only {named:.100}")


def _row_of(parts: list[tuple[str, Any]], where: str) -> Row | Fault:
    """A row of one field, or of a prompt and a completion, which are both text or both messages."""
    if all(isinstance(value, list) for _, value in parts) and parts[0][0] in ("messages", "prompt"):
        messages = [message for _, value in parts for message in value]
        why = _wrong_messages(messages)
        return Row(where, messages=messages) if why is None else Fault(where, why)
    for name, value in parts:
        if name == "messages":
            return Fault(where, f"messages is a {_kind(value)}, not a list")
        if not isinstance(value, str):
            return Fault(where, f"{name} is a {_kind(value)}, not text")
        if _HALVES.search(value):
            return Fault(where, f"{name} holds half of a character (a lone surrogate)")
    return Row(where, *(value for _, value in parts))


_HALVES = re.compile("[\ud800-\udfff]")


def _wrong_messages(messages: list[Any]) -> str | None:
    if not messages:
        return "there are no messages"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"message {i + 1} has no role"
        if _HALVES.search(json.dumps(message, ensure_ascii=False, default=str)):
            return f"message {i + 1} holds half of a character (a lone surrogate)"
    return None


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "truth value", int: "number", float: "number", list: "list", dict: "object"}
    return kinds.get(type(value), type(value).__name__)


# -- the text that needs no file -------------------------------------------------------------------------
def prose() -> Iterator[Row]:
    """The English of CPython's own manual (`pydoc_data.topics`), a row for each topic, each paragraph once.

    Its lines are joined to paragraphs; underlines, stars of emphasis, tables and rules of grammar are left out;
    examples of code stay as they are. Raises UsageError where Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("This Python carries no pydoc_data.", "Give the text with --calibration FILE.") from error
    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = dict.fromkeys(filter(None, map(_paragraph, re.split(r"\n\s*\n", topics[name]))))
        fresh = [text for text in paragraphs if text not in seen]
        seen.update(fresh)
        yield Row(f"the topic {name}", "\n\n".join(fresh))


def prose_name() -> str:
    """Which text `prose` gives: it differs with Python's version."""
    return f"pydoc_data.topics of Python {sys.version_info.major}.{sys.version_info.minor}"


_UNDERLINE = re.compile(r"^\s*([*=\-~^])\1{2,}\s*$", re.MULTILINE)
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(?=\S)([^*\n]+?)(?<=\S)\*{1,2}(?![\w*])")
_BROKEN = re.compile(r"(?<=\w)-\n\s*(?=\w)")
_PROSE = re.compile(r"[A-Z\"“*(][^\n]*(\n[^\n]+)*[.:!?)]")


def _paragraph(block: str) -> str:
    """One paragraph, as people write it; empty for an underline, a table or a rule of grammar."""
    block = _UNDERLINE.sub("", block).strip("\n")
    if "::=" in block or block.lstrip().startswith(("+--", "|")):
        return ""
    text = block.strip()
    if text.startswith((">>>", "#")) or not _PROSE.fullmatch(text) or len(text.split()) < 6:
        return block
    return _EMPHASIS.sub(r"\1", " ".join(_BROKEN.sub("-", text).split()))
