"""Rows of every kind of file; what is malformed is told, what cannot be read is refused with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaotui.compress.text import sources as texts
from miaotui.compress.text.sources import Fault, Row, prose, row_of, rows
from miaotui.errors import UsageError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values))
    return path


def read(path: Path) -> tuple[list[Row], list[Fault]]:
    faults: list[Fault] = []
    return list(rows(path, faults.append)), faults


# -- one row ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "row"),
    [
        ({"text": "a", "content": "b", "id": 1}, Row("w", "a")),
        ({"text": None, "content": "b"}, Row("w", "b")),
        ({"prompt": "a ", "completion": "b"}, Row("w", "a ", "b")),
        ({"prompt": "a", "text": "t"}, Row("w", "t")),
        ({"messages": TALK, "text": "t"}, Row("w", messages=TALK)),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, Row("w", messages=TALK)),
    ],
)
def test_a_row_by_its_fields(values: Any, row: Row) -> None:
    assert row_of(values, "w") == row


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([1], "a list, not an object"),
        ({}, "only nothing"),
        ({"prompt": "a", "id": 2}, "only prompt, id"),
        ({"text": 3}, "text is a number"),
        ({"prompt": "a", "completion": TALK}, "completion is a list"),
        ({"prompt": TALK, "completion": "a"}, "prompt is a list"),
        ({"messages": "a"}, "messages is a text"),
        ({"messages": []}, "no messages"),
        ({"messages": [TALK[0], {"content": "a"}]}, "message 2 has no role"),
        ({"messages": ["a"]}, "message 1 has no role"),
        ({"text": "a\ud800"}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]}, "lone surrogate"),
    ],
)
def test_what_is_no_row(values: Any, why: str) -> None:
    fault = row_of(values, "w")
    assert isinstance(fault, Fault)
    assert why in str(fault)


def test_prompt_and_completion_are_one_text() -> None:
    assert Row("w", "a ", "b").whole == "a b"


# -- files -----------------------------------------------------------------------------------------------
def test_a_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffOne\r\n\n秒推\n".encode())
    assert read(file) == ([Row(str(file), "One\r\n\n秒推\n")], [])
    file.write_bytes(b"")
    assert read(file) == ([], [])


@given(st.lists(st.sampled_from(["", "a", "秒推 goes on", " "]), max_size=40), st.integers(1, 40))
def test_a_long_text_in_pieces_is_the_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int
) -> None:
    file = tmp_path_factory.mktemp("pieces") / "a.txt"
    file.write_bytes("\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE_BYTES", size)
        found, _ = read(file)
    assert "".join(row.text for row in found) == "\n".join(lines)
    assert [row.continues for row in found] == [False, *[True] * (len(found) - 1)][: len(found)]
    longest = max(map(len, "\n".join(lines).encode().splitlines(keepends=True)), default=0)
    assert all(len(row.text.encode()) < 2 * size + longest for row in found)


def test_json_lines_by_name_or_by_content(tmp_path: Path) -> None:
    lines = ["", {"text": "a\nb"}, {"messages": TALK}, "{", {"id": 3}, {"content": "c"}]
    file = write_lines(tmp_path / "a.jsonl", *lines)
    found, faults = read(file)
    assert [(row.text, row.messages) for row in found] == [("a\nb", None), ("", TALK), ("c", None)]
    assert [fault.where for fault in faults] == [f"{file}, line 4", f"{file}, line 5"]
    assert "not JSON" in faults[0].why
    with pytest.raises(UsageError, match="line 4 cannot be used: it is not JSON"):
        list(rows(file))
    assert [row.text for row in read(write_lines(tmp_path / "a.txt", {"text": "a"}, {"text": "b"}))[0]] == ["a", "b"]
    assert [row.text for row in read(write_lines(tmp_path / "b.txt", '{"a set": of words}'))[0]] == [
        '{"a set": of words}'
    ]


def test_deep_nesting_is_a_fault(tmp_path: Path) -> None:
    found, faults = read(write_lines(tmp_path / "a.jsonl", "[" * 200_000, {"text": "a"}))
    assert [row.text for row in found] == ["a"]
    assert len(faults) == 1


@pytest.mark.parametrize("lines", [["Grüße", "x"], ['{"text": "a"}', '{"text": "ü"}']])
def test_broken_utf_8_names_file_and_byte(tmp_path: Path, lines: list[str]) -> None:
    content = "\n".join(lines).encode("latin-1")
    at = next(i for i, byte in enumerate(content) if byte > 127)
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\.txt is not UTF-8 \(byte {at}\)"):
        list(rows(file, lambda fault: None))


def test_broken_utf_8_in_a_later_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"abcdef\n\nghi\xff")
    with pytest.raises(UsageError, match=r"byte 11"):
        list(rows(tmp_path / "a.txt"))


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git" / "empty").mkdir(parents=True)
    (tmp_path / "b" / "2.txt").write_text("two")
    write_lines(tmp_path / "a.jsonl", {"text": "one"})
    for name in (".git/x.txt", "c.png", ".hidden.txt"):
        (tmp_path / name).write_text("no")
    assert [row.text for row in read(tmp_path)[0]] == ["one", "two"]
    with pytest.raises(UsageError, match="holds no text"):
        list(rows(tmp_path / ".git" / "empty"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        with pytest.raises(UsageError, match=f"{name} cannot be read"):
            list(rows(tmp_path / name))


# -- Parquet ---------------------------------------------------------------------------------------------
def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_parquet_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "BATCH_ROWS", 2)
    file = parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4, 5], "text": ["a", None, "c", "d", "e"]})
    found, faults = read(file)
    assert [row.text for row in found] == ["a", "c", "d", "e"]
    assert [row.where for row in found[:2]] == [f"{file}, row 1", f"{file}, row 3"]
    assert [fault.where for fault in faults] == [f"{file}, row 2"]


def test_parquet_with_conversations(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"messages": [TALK, TALK[:1]]})
    assert [row.messages for row in read(file)[0]] == [TALK, TALK[:1]]


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only the columns id, words"):
        list(rows(parquet(tmp_path / "a.parquet", {"id": [1], "words": ["a"]})))
    whole = parquet(tmp_path / "b.parquet", {"text": ["a"]}).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-9])
    with pytest.raises(UsageError, match=r"b\.parquet cannot be read"):
        list(rows(tmp_path / "b.parquet"))
    pa = pytest.importorskip("pyarrow")
    broken = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    with pytest.raises(UsageError, match="is not UTF-8"):
        list(rows(parquet(tmp_path / "c.parquet", {"text": broken})))


# -- the text that needs no file -------------------------------------------------------------------------
def test_prose_is_prose() -> None:
    found = [row.text for row in prose()]
    text = "\n\n".join(found)
    assert len(text) > 200_000
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not re.search(r"^\s*([*=~^-])\1{3,}\s*$", text, re.MULTILINE), "underlines go"
    assert "::=" not in text
    assert "\n+---" not in text
    assert ">>> " in text, "examples stay"
    assert max(map(len, text.split("\n"))) > 500, "lines are joined to paragraphs"
    assert [row.text for row in prose()] == found
