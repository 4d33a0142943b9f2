"""The share of tokens on which another engine agrees, from what it answers and from our own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import interop
from benchmarks.peer_kit.environments import PeerUnavailableError
from tests.compress import toy_folders

WORDS = " ".join(f"w{i * 7 % 96}" for i in range(400))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interop")
    return toy_folders.write(folder / "model", toy_folders.draw(toy_folders.CONFIG, 0))


@pytest.fixture(scope="module")
def ours(artefact: Path) -> interop.Ours:
    text = artefact.parent / "text.txt"
    text.write_text(WORDS)
    return interop.Ours(artefact, "fp32", 1, interop.draw(artefact, text, 3, 40))


def said(ours: interop.Ours) -> dict[str, Any]:
    """What an engine that is ours would answer."""
    scorer, top1 = ours._load(), []
    for window in [*ours.windows["text"], *ours.windows["answers"]]:
        rows = np.concatenate([np.array(part) for part in scorer.logits(interop.Window(window))])
        top1.append(rows.argmax(axis=1).tolist())
    scorer.close()
    return {"top1": top1, "versions": {"it": "1"}, "settings": {}}


def test_windows_are_text_and_our_own_greedy_answers(ours: interop.Ours) -> None:
    assert [len(window) for windows in ours.windows.values() for window in windows] == [40] * 6
    for text, answer in zip(*ours.windows.values(), strict=True):
        np.testing.assert_array_equal(text[: interop.PROMPT], answer[: interop.PROMPT])
    said_by_us = said(ours)["top1"][3:]
    for answer, top1 in zip(ours.windows["answers"], said_by_us, strict=True):
        np.testing.assert_array_equal(answer[interop.PROMPT :], top1[interop.PROMPT - 1 :])


def test_an_engine_that_is_ours_agrees(ours: interop.Ours) -> None:
    text, answers = ours.compare("ours", said(ours))
    assert (text.agreement, text.low, text.high, text.gap_largest) == (1, 1, 1, 0)
    assert (text.tokens, answers.tokens) == (3 * 39, 3 * (40 - interop.PROMPT))


def test_other_choices_are_counted_with_their_gap(ours: interop.Ours) -> None:
    theirs = said(ours)
    theirs["top1"][1][5] = (theirs["top1"][1][5] + 1) % 96
    theirs["top1"][3][interop.PROMPT - 2] += 1  # a prompt's token, which does not count
    text, answers = ours.compare("other", theirs)
    assert text.agreement == pytest.approx(1 - 1 / 117)
    assert text.low < text.agreement < text.high == 1
    assert text.gap_median == text.gap_largest > 0
    assert answers.agreement == 1
    assert "99.15% of 117 tokens" in interop.line(text)


def test_readers_of_folders_and_files(artefact: Path) -> None:
    everyone = list(interop.READERS)
    assert list(interop.readers_of(artefact, everyone)) == ["transformers", "vllm"]
    assert list(interop.readers_of(artefact / "config.json", everyone)) == ["llama.cpp", "llama.cpp-float32"]


def test_an_engine_that_fails_says_why(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(interop.READERS, "broken", interop.Reader("no_such_reader", False, None))
    with pytest.raises(PeerUnavailableError, match="no_such_reader"):
        interop.ask("broken", artefact, [np.zeros(4, np.int32)], 1)


def test_exit_status_and_figures(artefact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def ask(engine: str, artefact: Path, windows: list[Any], threads: int) -> dict[str, Any]:
        if engine == "vllm":
            raise PeerUnavailableError("it is not here")
        return {"top1": [[0] * 39] * 2, "versions": {}, "settings": {}}

    monkeypatch.setattr(interop, "ask", ask)
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    base = ["interop", str(artefact), "--text", str(text), "--windows", "1", "--window", "40", "--threads", "1"]

    def run(*more: str) -> int:
        monkeypatch.setattr("sys.argv", [*base, *more])
        return interop.main()

    output = tmp_path / "figures.json"
    assert run("--engines", "transformers", "--output", str(output)) == 1
    assert run("--engines", "transformers", "--floor", "0") == 0
    assert [row["kind"] for row in json.loads(output.read_text())] == ["text", "answers"]
    assert run("--engines", "vllm", "--floor", "0") == 1
    assert "vllm: not measured, it is not here" in capsys.readouterr().out
