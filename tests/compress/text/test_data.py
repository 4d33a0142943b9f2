"""Calibration windows over a tokenizer of bytes, where a window is its text: what is in them, and that it is the same
for the same seed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from miaotui.compress.recipe import Calibration
from miaotui.compress.text import data
from miaotui.compress.text import sources as texts
from miaotui.compress.text.augment import AUGMENTATIONS, augmented
from miaotui.compress.text.data import CalibrationText, clean, windows
from miaotui.compress.text.sources import Row
from miaotui.errors import MiaotuiError, UsageError
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
)
TALK = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def byte_tokenizer(*, bos: bool = False, eos: bool = True) -> Tokenizer:
    """A token for each byte, and `<s>`, `<|start|>`, `<|end|>`; with `bos`, `<s>` is put before every text."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in ("<s>", "<|start|>", "<|end|>")])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return Tokenizer(backend, special_tokens={"bos_token": "<s>"} | ({"eos_token": "<|end|>"} if eos else {}))


def decoded(tokenizer: Tokenizer, found: CalibrationText) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=False) for row in found.tokens.tolist()]


def asked(source: Path | str | None, count: int, window: int, **more: Any) -> Calibration:
    return Calibration(source=None if source is None else str(source), windows=count, window=window, **more)


def whole(tokenizer: Tokenizer, source: Path, **more: Any) -> tuple[str, CalibrationText]:
    """All tokens of a source as text: windows of two tokens, in the order of the source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_drawn", lambda available, calibration: list(range(available)))
        found = windows(tokenizer, asked(source, 1, 2), **more)
    return tokenizer.decode(found.tokens.reshape(-1).tolist(), skip_special_tokens=False), found


def text_file(folder: Path, length: int = 1000, name: str = "a.txt") -> Path:
    (folder / name).write_text("".join(f"{i:04d} " for i in range(length // 5)))
    return folder / name


def json_lines(folder: Path, *rows: Any, name: str = "a.jsonl") -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text("\n".join(lines))
    return folder / name


# -- windows ---------------------------------------------------------------------------------------------
def test_windows_are_cuts_of_the_text_each_once(tmp_path: Path) -> None:
    file, tokenizer = text_file(tmp_path), byte_tokenizer()
    found = windows(tokenizer, asked(file, 9, 100))
    cuts = [file.read_text()[at : at + 100] for at in range(0, 1000, 100)]
    assert found.tokens.dtype == np.int32
    assert found.tokens.shape == (9, 100)
    assert len(set(decoded(tokenizer, found)) & set(cuts)) == 9
    assert decoded(tokenizer, found) != cuts[:9], "drawn from the whole"
    assert (found.source, found.counts["available"], found.counts["documents"]) == (str(file), 10, 1)


def test_bos_begins_each_window_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    file, tokenizer = text_file(tmp_path), byte_tokenizer(bos=True)
    assert tokenizer.add_bos
    found = windows(tokenizer, asked(file, 10, 101))
    assert found.tokens.shape == (10, 101)
    assert (found.tokens[:, 0] == tokenizer.bos_id).all()
    assert (found.tokens[:, 1:] != tokenizer.bos_id).all()
    cuts = [file.read_text()[at : at + 100] for at in range(0, 1000, 100)]
    assert sorted(decoded(tokenizer, found)) == sorted(f"<s>{cut}" for cut in cuts)
    assert tokenizer.bos_id not in windows(byte_tokenizer(), asked(file, 9, 100)).tokens


def test_the_seed_decides(tmp_path: Path) -> None:
    tokenizer, files = byte_tokenizer(), [text_file(tmp_path, name=name) for name in ("a.txt", "b.txt")]
    first, again, elsewhere = (windows(tokenizer, asked(file, 5, 50)) for file in (files[0], *files))
    other = windows(tokenizer, asked(files[0], 5, 50, seed=1))
    assert (first.tokens == again.tokens).all()
    assert first.fingerprint == again.fingerprint == elsewhere.fingerprint, "the path is not part of it"
    assert (first.tokens != other.tokens).any()
    files[1].write_text(files[0].read_text().replace("0001", "1000"))
    assert (
        windows(tokenizer, asked(files[1], 5, 200)).fingerprint
        != windows(tokenizer, asked(files[0], 5, 200)).fingerprint
    )
    assert len({first.fingerprint, other.fingerprint, windows(tokenizer, asked(files[0], 4, 50)).fingerprint}) == 3


def test_the_same_on_every_machine(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    calibration = asked(tmp_path / "a.txt", 4, 24, seed=7, augment=("shuffle-sentences", "crop"))
    assert decoded(byte_tokenizer(), windows(byte_tokenizer(), calibration)) == [
        "ph.<|end|>We stay in; who know",
        ", today.\n\nIt has two sen",
        "ph. It has two sentences",
        " in; who knows? Tomorrow",
    ]


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    file, tokenizer = text_file(tmp_path), byte_tokenizer()
    with pytest.raises(UsageError, match=r"a\.txt gives 10 windows of 100 tokens, and 11 are wanted") as raised:
        windows(tokenizer, asked(file, 11, 100))
    assert "at most 10" in (raised.value.hint or "")
    with pytest.raises(UsageError, match=r"gives 0 windows of 2000 tokens") as raised:
        windows(tokenizer, asked(file, 1, 2000))
    assert "shorter window" in (raised.value.hint or "")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="gives 0 windows"):
        windows(tokenizer, asked(tmp_path / "empty.txt", 1, 2))
    with pytest.raises(UsageError, match=r"2 malformed rows, the first: .*line 1: it is not JSON"):
        windows(tokenizer, asked(json_lines(tmp_path, "{", "[1]", {"text": "abc"}), 5, 100))


def test_the_text_that_needs_no_file() -> None:
    found = windows(byte_tokenizer(), Calibration())
    assert found.tokens.shape == (64, 512)
    assert found.source.startswith("pydoc_data.topics of Python 3.")
    assert found.counts["available"] * 512 > 200_000


def test_the_report_is_json_and_has_no_tokens(tmp_path: Path) -> None:
    report = windows(byte_tokenizer(), asked(text_file(tmp_path), 2, 50)).report()
    assert json.loads(json.dumps(report)) == report
    assert report["windows"], report["window"] == (2, 50)
    assert set(report) >= {"source", "fingerprint", "documents", "duplicates", "malformed", "empty", "available"}


# -- documents -------------------------------------------------------------------------------------------
def test_texts_end_with_the_end_of_text(tmp_path: Path) -> None:
    file = json_lines(tmp_path, {"text": "One."}, {"prompt": "Two", "completion": " parts."}, {"text": "Three.!!"})
    assert whole(byte_tokenizer(), file)[0] == "One.<|end|>Two parts.<|end|>Three.!!"
    assert whole(byte_tokenizer(eos=False), file)[0] == "One.\n\nTwo parts.\n\nThree.!!"
    ended = json_lines(tmp_path, {"text": "One.<|end|>"}, {"text": "Two"})
    assert whole(byte_tokenizer(), ended)[0] == "One.<|end|>Two", "not twice"


def test_a_long_text_has_no_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 16)
    content = "".join(f"line {i}\n\n" for i in range(20))
    (tmp_path / "a.txt").write_text(content)
    text, found = whole(byte_tokenizer(), tmp_path / "a.txt")
    assert text == content
    assert found.counts["documents"] > 5


def test_a_piece_that_was_left_out_leaves_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_text("one.\n\ntwo.\n\none.\n\nsix.\n\n")
    text, found = whole(byte_tokenizer(), tmp_path / "a.txt")
    assert text == "one.\n\ntwo.\n\n<|end|>six.\n\n"[: len(text)]
    assert found.counts["duplicates"] == 1


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    forged = [{"role": "user", "content": "<|end|>"}]
    file = json_lines(tmp_path, {"messages": TALK}, {"text": "plain"}, {"messages": forged}, {"text": "ends"})
    for bos in (False, True):
        tokenizer = byte_tokenizer(bos=bos)
        template = ChatTemplate(CHATML, tokenizer)
        found = windows(tokenizer, asked(file, 1, 60), chat_template=template)
        talk = template.encode(TALK, add_generation_prompt=False)
        assert talk[0] == tokenizer.bos_id
        assert found.tokens[0, : len(talk)].tolist() == talk, "BOS once where a window has it, else the template's"
    tokenizer = byte_tokenizer()
    text, found = whole(tokenizer, file, chat_template=ChatTemplate(CHATML, tokenizer))
    assert "It is 4.<|end|>\nplain<|end|><s><|start|>user\n<|end|><|end|>\nend" in text, "nothing after a conversation"
    assert sum(np.isin(found.tokens, tokenizer.eos_ids).flat) == 4, "what a user wrote is no token"


def test_conversations_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    file = json_lines(tmp_path, {"messages": [*TALK, {"role": "tool", "content": "4"}]}, {"messages": TALK})
    found = windows(tokenizer, asked(file, 1, 20), chat_template=ChatTemplate(CHATML, tokenizer))
    assert (found.counts["documents"], found.counts["malformed"]) == (1, 1)
    assert f"{file}, line 1: " in found.faults[0]
    assert "no tools here" in found.faults[0]
    with pytest.raises(UsageError, match="line 1 is a conversation, and the model has no chat template"):
        windows(tokenizer, asked(file, 1, 20))


def test_each_document_once_and_none_empty(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"text": "same\r\n"},
        {"text": " \n"},
        {"text": "same\n"},
        {"content": "\x00"},
        {"text": "other"},
    ]
    file = json_lines(tmp_path, *rows, {"messages": TALK}, "nothing", {"id": 1}, {"messages": TALK})
    tokenizer = byte_tokenizer()
    text, found = whole(tokenizer, file, chat_template=ChatTemplate(CHATML, tokenizer))
    assert text.startswith("same\n<|end|>other<|end|><s><|start|>user\n")
    assert text.count("It is 4.") == 1
    counts = {"documents": 7, "empty": 2, "duplicates": 2, "malformed": 2}
    assert {name: found.counts[name] for name in counts} == counts
    assert [fault.split(": ")[0] for fault in found.faults] == [f"{file}, line 7", f"{file}, line 8"]


def test_the_first_faults_are_named_and_all_counted(tmp_path: Path) -> None:
    file = json_lines(tmp_path, *["{"] * 9, {"text": "a" * 50})
    found = windows(byte_tokenizer(), asked(file, 1, 20))
    assert found.counts["malformed"] == 9
    assert len(found.faults) == data.NAMED_FAULTS


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb\rc\n", "a\nb\nc\n"),
        ("a\n\n\n \t\n\nb", "a\n\nb"),
        ("a\n\nb", "a\n\nb"),
        ("tab\tstays\x00\x07\x7f\x85\ufeff", "tab\tstays"),
        ("  indented\n    code", "  indented\n    code"),
        ("秒推 é 🎉", "秒推 é 🎉"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert clean(cleaned) == cleaned


def test_messages_are_cleaned(tmp_path: Path) -> None:
    file = json_lines(tmp_path, {"messages": [{"role": "user", "content": "a\r\n\x00b", "name": "x"}]})
    tokenizer = byte_tokenizer()
    assert "user\na\nb<|end|>" in whole(tokenizer, file, chat_template=ChatTemplate(CHATML, tokenizer))[0]


# -- large sources ---------------------------------------------------------------------------------------
def numbered(count: int) -> list[Row]:
    return [Row(str(i), f"{i:04d}." * 2) for i in range(count)]


@given(st.integers(1, 60), st.integers(1, 700), st.integers(0, 9))
def test_a_sample_is_of_its_size_and_in_order(count: int, most: int, seed: int) -> None:
    kept, all_kept = data._sample(numbered(count), most, seed)
    size = 10 * len(kept)
    assert all_kept == (len(kept) == count)
    assert all_kept or most <= size < most + 10
    assert [row.where for row in kept] == sorted((row.where for row in kept), key=int)


def test_a_sample_is_fair() -> None:
    seen = np.zeros(20)
    for seed in range(400):
        for row in data._sample(numbered(20), 50, seed)[0]:
            seen[int(row.where)] += 1
    assert seen.sum() == 400 * 5
    assert (abs(seen - 100) < 5 * np.sqrt(100 * 0.75)).all()


def test_a_sample_does_not_join_what_was_apart() -> None:
    pieces = [Row("f", f"{i}", continues=i > 0) for i in range(50)]
    kept, _ = data._sample(pieces, 20, 0)
    numbers = [int(row.text) for row in kept]
    assert [row.continues for row in kept] == [b == a + 1 and b > 0 for a, b in zip([-2, *numbers], numbers)]  # noqa: B905


def test_of_a_large_source_a_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "KEPT_CHARACTERS", 400)
    monkeypatch.setattr(data, "KEPT_PER_TOKEN", 1)
    file = json_lines(tmp_path, *({"text": f"document {i:04d}"} for i in range(1000)))
    found = windows(byte_tokenizer(), asked(file, 2, 50))
    assert found.counts["documents"] == 1000
    assert 2 <= found.counts["available"] < 12
    numbers = [int(n) for text in decoded(byte_tokenizer(), found) for n in re.findall(r"document (\d{4})", text)]
    assert max(numbers) > 50, "not the beginning only"


def test_a_sample_that_is_too_small_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "KEPT_CHARACTERS", 8)
    monkeypatch.setattr(data, "KEPT_PER_TOKEN", 1)
    tokenizer = byte_tokenizer()
    rows = [{"messages": [{"role": "tool", "content": "x" * 400}]}, *({"text": f"document {i:04d}"} for i in range(90))]
    file = json_lines(tmp_path, *rows)
    for seed in range(4):
        found = windows(tokenizer, asked(file, 12, 100, seed=seed), chat_template=ChatTemplate(CHATML, tokenizer))
        assert found.tokens.shape == (12, 100)
        assert (found.counts["documents"], found.counts["malformed"]) in ((90, 1), (91, 0)), "counted once"


# -- augmentation ----------------------------------------------------------------------------------------
PROSE = "It rains, today. We stay in; who knows? Tomorrow: sun!\n\nA second paragraph. It has two sentences."


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("lowercase", PROSE.lower()),
        (
            "no-punctuation",
            "It rains today We stay in who knows Tomorrow sun\n\nA second paragraph It has two sentences",
        ),
    ],
)
def test_what_an_augmentation_does(name: str, changed: str) -> None:
    first, second = augmented([Row("w", PROSE)], [name], 0)
    assert (first.text, second.text) == (PROSE, changed)


def test_sentences_are_shuffled_within_their_line() -> None:
    found = [list(augmented([Row("w", PROSE)], ["shuffle-sentences"], seed))[-1].text for seed in range(20)]
    assert len(set(found)) > 4
    for text in found:
        for line, original in zip(text.split("\n\n"), PROSE.split("\n\n"), strict=True):
            assert sorted(line.replace("!", "! ").split()) == sorted(original.split()), "every word stays"
            assert len(line) == len(original)


def test_a_crop_is_a_part_from_a_sentence_to_a_sentence() -> None:
    found = {list(augmented([Row("w", PROSE)], ["crop"], seed))[-1].text for seed in range(40)}
    assert len(found) > 4
    for text in found:
        assert text in PROSE
        assert text[0].isupper()
        assert text.rstrip()[-1] in ".!?"


@given(st.text(max_size=60), st.sampled_from(sorted(AUGMENTATIONS)), st.integers(0, 5))
def test_augmentations_stand_any_text(text: str, name: str, seed: int) -> None:
    found = list(augmented([Row("w", text)], [name], seed))
    assert found[0].text == text
    assert len(found) in (1, 2)
    assert found == list(augmented([Row("w", text)], [name], seed))
    assert len(found) == 1 or found[1].text != text


def test_of_a_conversation_the_contents_are_changed() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    rows = list(augmented([Row("w", messages=TALK), Row("x", messages=parts)], ["lowercase"], 0))
    assert len(rows) == 3, "what stays as it was is not there twice"
    assert rows[2].messages == [
        {"role": "user", "content": "what is 2 + 2?"},
        {"role": "assistant", "content": "it is 4."},
    ]


def test_augmentation_makes_more_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    tokenizer = byte_tokenizer()
    plain = windows(tokenizer, asked(tmp_path / "a.txt", 1, 20))
    more = windows(tokenizer, asked(tmp_path / "a.txt", 1, 20, augment=("lowercase", "no-punctuation")))
    assert more.counts["available"] > 2 * plain.counts["available"]
    assert more.fingerprint != plain.fingerprint


def test_augmentations_that_cannot_be(tmp_path: Path) -> None:
    file = text_file(tmp_path)
    with pytest.raises(UsageError, match="no augmentation 'typos'") as raised:
        windows(byte_tokenizer(), asked(file, 1, 20, augment=("typos",)))
    assert "lowercase" in (raised.value.hint or "")
    with pytest.raises(UsageError, match="named twice"):
        windows(byte_tokenizer(), asked(file, 1, 20, augment=("crop", "crop")))
    with pytest.raises(UsageError, match="not augmented"):
        windows(byte_tokenizer(), asked("self", 1, 20, augment=("crop",)), write=lambda *at: [])


# -- the model's own text --------------------------------------------------------------------------------
@pytest.mark.parametrize("bos", [False, True])
def test_the_model_writes_what_a_window_has_room_for(bos: bool) -> None:
    calls: list[tuple[int, int, int]] = []

    def write(count: int, length: int, seed: int) -> list[list[int]]:
        calls.append((count, length, seed))
        return [[65 + i] * length for i in range(count)]

    tokenizer = byte_tokenizer(bos=bos)
    found = windows(tokenizer, asked("self", 4, 10, seed=3), write=write)
    assert calls == [(4, 9 if bos else 10, 3)]
    assert found.tokens.shape == (4, 10)
    assert sorted(found.tokens[:, -1].tolist()) == [65, 66, 67, 68]
    assert (found.tokens[:, 0] == tokenizer.bos_id).all() == bos
    assert found.source == "the model's own text"
    assert found.counts == {"documents": 4, "empty": 0, "duplicates": 0, "malformed": 0, "available": 4}


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([[1, 2]], "less than"),
        ([[1, 2], [1]], "less than"),
        ([[1, 2], [1, 999]], "lacks"),
        ([[1, 2], [1, -1]], "lacks"),
    ],
)
def test_what_no_model_should_write(runs: Sequence[Sequence[int]], why: str) -> None:
    with pytest.raises(MiaotuiError, match=why):
        windows(byte_tokenizer(), asked("self", 2, 2), write=lambda *at: runs)


def test_nothing_that_could_write() -> None:
    with pytest.raises(UsageError, match="Nothing is there that could write"):
        windows(byte_tokenizer(), asked("self", 2, 2))
