"""Text that comes token by token, and stop strings in it."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from miaotui.errors import RequestError
from miaotui.model.detokenizer import IncrementalDetokenizer, StopChecker
from miaotui.model.token_text import Joining
from miaotui.model.tokenizer import Tokenizer
from tests.model import tiny_tokenizers as tiny

KINDS = ["byte-level", "byte-fallback", "no-prefix", "metaspace"]


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte-level":
        return Tokenizer(tiny.byte_level("llama-bpe"))
    if kind == "metaspace":
        return Tokenizer(tiny.metaspace())
    metadata = tiny.gguf_sentencepiece() | {"tokenizer.ggml.add_space_prefix": kind == "byte-fallback"}
    return Tokenizer.from_checkpoint(tiny.FakeCheckpoint("gguf", metadata))


def test_kinds_are_what_they_are_called() -> None:
    kinds = [tokenizer(kind).decoder_kind.joining for kind in KINDS]
    assert kinds == [Joining.BYTE_LEVEL, Joining.BYTE_FALLBACK, Joining.BYTE_FALLBACK, Joining.METASPACE]


def _streamed(of: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(of, skip)
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pushed = [detokenizer.push(ids[a:b]) for a, b in pairwise(edges)]
    return [*pushed, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pushes_join_to_decode_for_any_ids_and_cuts(kind: str, data: st.DataObject) -> None:
    of = tokenizer(kind)
    some_id = st.one_of(st.integers(0, of.vocab_size + 3), st.integers(3, 258))
    ids = data.draw(st.lists(some_id, max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 100), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(_streamed(of, ids, cuts, skip)) == of.decode(ids, skip)


@pytest.mark.parametrize("kind", KINDS[:3])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), skip=st.booleans())
def test_text_comes_back_one_token_at_a_time(kind: str, text: str, skip: bool) -> None:
    of = tokenizer(kind)
    ids = of.encode(text, add_special_tokens=False)
    parts = _streamed(of, ids, list(range(len(ids))), skip)
    assert "".join(parts) == of.decode(ids, skip)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("text", tiny.TEXTS)
def test_no_half_characters(kind: str, text: str) -> None:
    of = tokenizer(kind)
    parts = _streamed(of, of.encode(text, add_special_tokens=False), list(range(2000)), skip=True)
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == of.decode(of.encode(text, add_special_tokens=False))


def test_a_lone_byte_shows_at_the_end_only() -> None:
    of = tokenizer("byte-fallback")
    detokenizer = IncrementalDetokenizer(of)
    assert detokenizer.push([3 + 0xF0]) == ""
    assert detokenizer.push([3 + 0x9F]) == ""
    assert detokenizer.flush() == "\ufffd\ufffd"
    assert detokenizer.push(of.encode("again", add_special_tokens=False)) == "again"


def test_other_decoders_go_through_a_window() -> None:
    words = {word: i for i, word in enumerate(["[UNK]", "quick", "brown", "fox"])}
    of = Tokenizer(Backend(WordLevel(words, unk_token="[UNK]")))
    assert of.decoder_kind.joining is Joining.OTHER
    parts = _streamed(of, [1, 2, 3, 1], [1, 2, 3], skip=True)
    assert parts == ["quick", " brown", " fox", " quick", ""]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=24),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=8),
    include=st.booleans(),
)
def test_stops_do_not_depend_on_the_cuts(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    whole = next((text[:end] for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))), None)
    stop = None if whole is None else max((s for s in stops if whole.endswith(s)), key=len)
    want = text if whole is None or stop is None else whole if include else whole[: -len(stop)]
    checker = StopChecker(stops, include)
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    got, hit = "", None
    for a, b in pairwise(edges):
        checked = checker.push(text[a:b])
        got, hit = got + checked.text, checked.stop
        if hit is not None:
            break
    if hit is None:
        got += checker.flush()
    assert (got, hit) == (want, stop)


def test_only_what_may_become_a_stop_is_held() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.push("Hello\n") == ("Hello", None)
    assert checker.push("\nUs") == ("", None)
    assert checker.push("ually") == ("\n\nUsually", None)
    assert checker.push("\n\nUser: x") == ("", "\n\nUser:")


def test_no_stops_hold_nothing_and_empty_ones_are_refused() -> None:
    assert StopChecker([]).push("text") == ("text", None)
    with pytest.raises(RequestError, match="empty"):
        StopChecker(["a", ""])
