"""Calibration text that a model writes itself: drawn from the model, always the same, and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miaotui import LLM, SamplingParams
from miaotui.checkpoint import open_checkpoint
from miaotui.cli.self_text import self_text
from miaotui.compress.recipe import Calibration
from miaotui.compress.text.data import windows
from miaotui.errors import UsageError
from miaotui.model.tokenizer import Tokenizer
from tests.compress import toy_folders


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIAOTUI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def toy(folder: Path, words: int = 96, **specials: str) -> Path:
    """A random model with a table of 96 tokens, of which the tokenizer knows the first `words`."""
    vocabulary = {f"w{i}": i for i in range(words)}
    toy_folders.write(folder, toy_folders.draw(toy_folders.CONFIG, 0), vocabulary=vocabulary)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_each_run_is_the_models_own_and_differs(tmp_path: Path) -> None:
    model = str(toy(tmp_path / "toy", bos_token="w3", eos_token="w2"))
    found = np.array(self_text(model, compute="fp32")(4, 40, 5))
    assert found.shape == (4, 40)
    assert len({row.tobytes() for row in found}) == 4
    assert np.isin(found, 2).any(), "it goes on past the end of a text"
    with LLM(model, max_model_len=64, compute="fp32") as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=-1)
        (output,) = llm.generate([[3, *found[0].tolist()]], params)
    rows = output.prompt_logprobs[1:]
    entropy = np.mean([-sum(np.exp(one.logprob) * one.logprob for one in row.values()) for row in rows])
    nll = np.mean([-row[token].logprob for row, token in zip(rows, found[0].tolist(), strict=True)])
    assert nll == pytest.approx(entropy, rel=0.35), "drawn as likely as the model has it"


def test_the_same_arguments_give_the_same_text(tmp_path: Path, home: Path) -> None:
    write = self_text(str(toy(tmp_path / "toy", eos_token="w2")))
    first = np.array(write(3, 20, 0))
    (kept,) = (home / "calibration").iterdir()
    kept.unlink()
    assert (first == write(3, 20, 0)).all()
    assert (first != np.array(write(3, 20, 1))).any()
    assert (first[:2] == np.array(write(2, 20, 0))).all()


def test_what_was_written_is_not_written_again(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = str(toy(tmp_path / "toy", eos_token="w2")), []
    first = np.array(self_text(model, tell=told.append)(3, 20, 0))
    assert len(told) == 1
    with monkeypatch.context() as patch:
        patch.setattr("miaotui.engine.llm.LLM", None)
        assert (first == self_text(model, tell=told.append)(3, 20, 0)).all()
        with pytest.raises(TypeError):
            self_text(model, compute="fp32")(3, 20, 0)
    assert len(told) == 1
    (kept,) = (home / "calibration").iterdir()
    kept.write_bytes(kept.read_bytes()[:-4])
    assert (first == self_text(model, tell=told.append)(3, 20, 0)).all()
    assert len(told) == 2
    np.save(kept.with_suffix(""), np.zeros((3, 21), np.int32))
    assert (first == self_text(model, tell=told.append)(3, 20, 0)).all()


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIAOTUI_HOME", str(tmp_path / "file"))
    model = str(toy(tmp_path / "toy", eos_token="w2"))
    assert np.array(self_text(model)(1, 4, 0)).shape == (1, 4)
    assert "cannot be written" in caplog.text


def test_only_tokens_that_the_tokenizer_has(tmp_path: Path) -> None:
    found = np.array(self_text(str(toy(tmp_path / "toy", words=20, eos_token="w2")))(4, 40, 0))
    assert found.max() < 20
    assert len(np.unique(found)) > 10


def test_a_model_without_a_beginning(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no token that a text begins after"):
        self_text(str(toy(tmp_path / "toy")))(1, 4, 0)


def test_the_demo_writes_its_calibration(demo_gguf: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(demo_gguf))
    options: dict[str, Any] = {"write": self_text(str(demo_gguf))}
    found = windows(tokenizer, Calibration(source="self", windows=3, window=24), **options)
    assert found.tokens.shape == (3, 24)
    assert found.fingerprint == windows(tokenizer, Calibration("self", windows=3, window=24), **options).fingerprint
    assert sum(" " in tokenizer.decode(row) for row in found.tokens.tolist()) == 3
