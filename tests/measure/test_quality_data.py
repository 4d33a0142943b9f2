"""Reading texts of every form, refusing what is none, and cutting windows."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaotui.errors import UsageError
from miaotui.measure.quality_data import Cut, Data, Messages, Window, cut_windows, read_data
from miaotui.model.tokenizer import Tokenizer, set_bos_eos
from tests.engine.toys import EOS, toy_tokenizer

PLAIN = toy_tokenizer()


def with_bos() -> Tokenizer:
    backend = toy_tokenizer().backend
    set_bos_eos(backend, "<end>", None)
    return Tokenizer(backend, special_tokens={"bos_token": "<end>"})


BOS = with_bos()


def render(messages: Messages) -> list[int]:
    return PLAIN.encode("".join(f"[{m['content']}]" for m in messages))


def cut(text: str, how: Cut, tokenizer: Tokenizer = PLAIN) -> list[Window]:
    return cut_windows(Data("text", [text]), how, tokenizer, render)[0]


# -- reading ---------------------------------------------------------------------------------------------
def test_a_text_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffOne\r\n\n  秒推\n".encode())
    assert read_data(str(file)).documents == ["One\r\n\n  秒推\n"]


def test_json_lines_by_name_or_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = "\n".join(["", json.dumps({"text": "a\nb"}), "", json.dumps({"messages": messages, "id": 3}), ""])
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(lines)
        assert read_data(str(tmp_path / name)).documents == ["a\nb", messages]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert read_data("-").documents == ["a\nb", messages]
    (tmp_path / "b.txt").write_text('{"a set": of words}')
    assert read_data(str(tmp_path / "b.txt")).documents == ['{"a set": of words}']


def test_the_default_needs_no_file() -> None:
    (prose,) = read_data(None).documents
    assert len(prose) > 300_000
    assert prose.count("\n") > 3000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.jsonl", b"\n\n", "no text"),
        ("latin.txt", "naïve".encode("latin-1"), r"not UTF-8 \(byte 2\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2, is not JSON"),
        ("other.jsonl", b'{"text": "a"}\n\n{"prompt": "b"}', "line 3, has neither"),
        ("wrong.jsonl", b'{"text": 3}', "line 1, has neither"),
        ("none.jsonl", b'{"messages": []}', "line 1, has neither"),
        ("list.jsonl", b"[1]", "line 1, has neither"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_data(str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_data(str(path))


# -- cutting ---------------------------------------------------------------------------------------------
@given(
    length=st.integers(2, 90), size=st.integers(2, 40), stride=st.none() | st.integers(1, 40),
    most=st.none() | st.integers(1, 9), bos=st.booleans(),
)  # fmt: skip
def test_windows_score_each_token_once_in_order(
    length: int, size: int, stride: int | None, most: int | None, bos: bool
) -> None:
    text = "".join(chr(33 + i) for i in range(length))
    tokenizer = BOS if bos else PLAIN
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = cut(text, Cut(size, min(stride, size) if stride else None, most), tokenizer)
    room = min(size - bos, len(ids))
    assert 1 <= len(windows) <= (most or length)
    scored = []
    for window in windows:
        assert window.tokens.dtype == np.int32
        assert len(window.tokens) == room + bos
        assert bos == (window.tokens[0] == EOS)
        at = ids.index(window.tokens[int(bos)])
        assert list(window.tokens[int(bos) :]) == ids[at : at + room]
        assert 1 <= window.first < len(window.tokens)
        scored += window.targets.tolist()
    assert scored == sorted(set(scored))
    assert scored[0] == ids[0 if bos else 1]
    if stride is None or stride >= size - bos:
        assert len(scored) == len(windows) * (room if bos else room - 1)
    else:
        assert scored == ids[ids.index(scored[0]) : ids.index(scored[-1]) + 1], "overlapping windows leave nothing out"


def test_only_as_much_is_tokenised_as_is_wanted() -> None:
    class Counting:
        add_bos, bos_id = False, None
        longest = 0

        def encode(self, text: str, **_: bool) -> list[int]:
            self.longest = max(self.longest, len(text))
            return list(range(len(text) // 20))  # longer tokens than the first guess allows for

    tokenizer = Counting()
    windows = cut("x" * 1_000_000, Cut(64, most=2), tokenizer)  # type: ignore[arg-type]
    assert np.concatenate([window.tokens for window in windows]).tolist() == list(range(128))
    assert tokenizer.longest < 10_000
    assert len(cut("x" * 1_000_000, Cut(64), tokenizer)) == 50_000 // 64  # type: ignore[arg-type]


def test_documents_one_after_the_other() -> None:
    data = Data("mixed", ["a", "b", [{"content": "c"}], [{"content": "d"}, {"content": "e"}], "f"])
    (window,), notes = cut_windows(data, Cut(64), PLAIN, render)
    assert PLAIN.decode(window.tokens.tolist()) == "a\n\nb[c][d][e]f"
    assert "one short window" in notes[0]
    (first,), none = cut_windows(data, Cut(5, most=1), PLAIN, render)
    assert (PLAIN.decode(first.tokens.tolist()), none) == ("a\n\nb[", [])


def test_the_text_of_a_special_token_is_that_token() -> None:
    (window,) = cut("a<end>b", Cut(3))
    assert window.tokens[1] == EOS


def test_too_little() -> None:
    with pytest.raises(UsageError, match="holds 1 tokens"):
        cut("a", Cut(8))
    assert len(cut("a", Cut(8), BOS)[0].targets) == 1


@pytest.mark.parametrize("wrong", [(1, None, None), (8, 9, None), (8, 0, None), (8, None, 0)])
def test_cuts_that_mean_nothing(wrong: tuple[int, int | None, int | None]) -> None:
    with pytest.raises(UsageError):
        Cut(*wrong)
