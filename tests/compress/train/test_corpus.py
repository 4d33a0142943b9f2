"""Texts as windows: what is dropped and counted, what is held out, and the order in which the rest is drawn."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from miaotui.compress.train.assets import TextFiles
from miaotui.compress.train.corpus import Corpus, Counts, Texts
from miaotui.compress.train.loader import Loader, Order, Position
from miaotui.errors import UsageError
from miaotui.model.tokenizer import Tokenizer
from tests.compress.train.making import tiny


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    tiny.write_tokenizer(tmp_path)
    return Texts(Tokenizer.from_checkpoint(TextFiles(tmp_path)), None, 8)


def read(texts: Texts, tmp_path: Path, rows: list[str], share: float = 0.0) -> Corpus:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    return texts.corpus(str(file), tmp_path / "windows.bin", share, 0)


def rows_of(count: int) -> list[str]:
    return [json.dumps({"text": f"row number {i} of them"}) for i in range(count)]


# -- windows -----------------------------------------------------------------------------------------------------
def test_documents_lie_end_to_end_with_the_end_of_text_between(texts: Texts, tmp_path: Path) -> None:
    corpus = read(texts, tmp_path, [json.dumps({"text": text}) for text in ("abc\r\ndef", "ghi", "jklmnopqrstuv")])
    stream = texts.tokenizer.decode(corpus.windows.flatten().tolist(), skip_special_tokens=False)
    assert stream == "abc\ndef</s>ghi</s>jklmnopqrstuv"[: len("abc\ndefghijklmnopqrstuv</s></s>")][: len(stream)]
    assert corpus.windows.shape == (24 // 8, 8)


def test_what_cannot_be_used_is_counted_and_named(texts: Texts, tmp_path: Path) -> None:
    rows = [*rows_of(10), "{broken", json.dumps({"txt": "x"}), json.dumps({"text": 3}), rows_of(1)[0], '{"text": " "}']
    corpus = read(texts, tmp_path, rows)
    counts = corpus.counts
    assert (counts.documents, counts.malformed, counts.duplicates, counts.empty) == (12, 3, 1, 1)
    assert ["line 11" in counts.faults[0], "line 12" in counts.faults[1], "line 13" in counts.faults[2]] == [True] * 3
    assert corpus.report()["malformed"] == 3


def test_parquet_and_json_lines_give_the_same_windows(texts: Texts, tmp_path: Path) -> None:
    lines = read(texts, tmp_path, rows_of(20))
    column = [json.loads(row)["text"] for row in rows_of(20)]
    parquet.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    other = texts.corpus(str(tmp_path / "rows.parquet"), tmp_path / "other.bin", 0.0, 0)
    assert np.array_equal(lines.windows, other.windows)
    assert lines.fingerprint == other.fingerprint


def test_what_is_held_out_is_not_trained_on(texts: Texts, tmp_path: Path) -> None:
    corpus = read(texts, tmp_path, rows_of(40), share=0.2)
    assert len(corpus.held) == round(0.2 * len(corpus.windows))
    assert sorted([*corpus.train.tolist(), *corpus.held.tolist()]) == list(range(len(corpus.windows)))
    again = texts.corpus(str(tmp_path / "rows.jsonl"), tmp_path / "b.bin", 0.2, 1)
    assert corpus.held.tolist() != again.held.tolist()


def test_too_little_text_says_what_is_wrong_with_it(texts: Texts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gives 0 windows of 8 tokens \(1 malformed rows, the first: .*line 1"):
        read(texts, tmp_path, ["{broken"])


def test_conversations_need_a_chat_template(texts: Texts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        read(texts, tmp_path, [json.dumps({"messages": [{"role": "user", "content": "hi"}]})])


# -- order -------------------------------------------------------------------------------------------------------
def corpus_of(windows: int, start: int = 0) -> Corpus:
    tokens = np.arange(start, start + windows, dtype=np.int32)[:, None] + np.zeros((1, 4), np.int32)
    return Corpus("made", tokens, np.arange(windows), np.empty(0, np.int64), Counts(), "")


def drawn(loader: Loader, batches: int) -> list[list[int]]:
    try:
        return [loader.next().tokens[:, 0].tolist() for _ in range(batches)]
    finally:
        loader.close()


def test_every_window_comes_once_before_any_comes_twice() -> None:
    order = Order([corpus_of(12)], [1.0], seed=3)
    found = drawn(Loader(order, 4, order.start()), 6)
    first, second = ([window for batch in half for window in batch] for half in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != sorted(first)


def test_tasks_are_mixed_by_weight() -> None:
    order = Order([corpus_of(50), corpus_of(7, start=100)], [1.0, 3.0], seed=0)
    windows = [window for batch in drawn(Loader(order, 10, order.start()), 80) for window in batch]
    share = sum(window >= 100 for window in windows) / len(windows)
    assert share == pytest.approx(0.75, abs=0.05)
    counts = Counter(window for window in windows if window >= 100)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_position_is_all_that_the_order_needs() -> None:
    order = Order([corpus_of(20), corpus_of(9, start=100)], [1.0, 1.0], seed=5)
    whole = drawn(Loader(order, 3, order.start()), 9)
    loader = Loader(order, 3, order.start())
    for _ in range(4):
        loader.next()
    at = loader.position
    loader.close()
    assert at.batch == 4
    assert sum(at.drawn) == 12
    assert drawn(Loader(order, 3, Position(at.batch, at.drawn)), 5) == whole[4:]


def test_processes_share_a_batch() -> None:
    order = Order([corpus_of(20)], [1.0], seed=1)
    whole, one, other = (
        drawn(Loader(order, 6, order.start(), rank=rank, processes=size), 3) for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    assert [sorted(a + b) for a, b in zip(one, other, strict=True)] == [sorted(batch) for batch in whole]
    assert [len(batch) for batch in one] == [3, 3, 3]


def test_private_batches_draw_each_window_for_itself() -> None:
    order = replace(Order([corpus_of(40)], [1.0], seed=1), poisson=True)
    found = drawn(Loader(order, 8, order.start()), 300)
    sizes = [len(batch) for batch in found]
    assert all(len(set(batch)) == len(batch) for batch in found)
    assert np.mean(sizes) == pytest.approx(8, rel=0.06)
    assert np.var(sizes) == pytest.approx(40 * 0.2 * 0.8, rel=0.3)


def test_what_goes_wrong_in_the_reader_reaches_the_training() -> None:
    order = Order([replace(corpus_of(4), train=np.array([9]))], [1.0], seed=1)
    loader = Loader(order, 2, order.start())
    with pytest.raises(IndexError):
        loader.next()
    loader.close()
