"""Packed weights kept on disk: the second load maps them, answers the same bits, and survives damage."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from miaotui.backends.cpu._native import Screen
from numpy.typing import NDArray

from miaotui import LLM, SamplingParams
from miaotui.backends.cpu import weights as cpu_weights
from miaotui.backends.ops import Step
from miaotui.checkpoint import open_checkpoint
from miaotui.model import build, packed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a bound that makes the demo worth keeping."""
    monkeypatch.setenv("MIAOTUI_HOME", str(tmp_path))
    monkeypatch.setattr(build, "LEAST_TO_KEEP", 0)
    return tmp_path / "packed"


def logits(path: Path, **options: bool) -> NDArray[np.float32]:
    """The demo's logits after three tokens."""
    _, executor = build.build(open_checkpoint(path), max_model_len=64, max_num_seqs=1, threads=2, **options)
    executor.allocate_cache(4)
    ids, order = np.array([1, 504, 3575], np.int32), np.arange(3, dtype=np.int32)
    ends = np.array([0, 3], np.int32)
    step = Step(ids, order, ends, ends[1:], np.arange(4, dtype=np.int32)[None], order)
    return executor.run(step).copy()


def test_the_second_load_maps_what_the_first_packed(
    demo_gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logits(demo_gguf)
    (file,) = folder.glob("*.packed")
    assert file.stat().st_size > 90e6
    monkeypatch.setattr(cpu_weights, "matrix", lambda *_: pytest.fail("packed again"))
    assert np.array_equal(logits(demo_gguf), first)


@pytest.mark.parametrize("at_first", [True, False])
def test_the_screen_is_mapped_too(
    demo_gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, at_first: bool
) -> None:
    """A file that was kept without one stays as it is: the screen is then made at each load."""
    logits(demo_gguf, greedy_screen=at_first)
    (file,) = folder.glob("*.packed")
    kept = file.read_bytes()
    made: list[object] = []
    screens = SimpleNamespace(of=lambda *rest: made.append(rest) or Screen.of(*rest), again=Screen.again)
    monkeypatch.setattr(cpu_weights, "Screen", screens)
    options = {"max_model_len": 64, "max_num_seqs": 1, "threads": 1}
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    with LLM(str(demo_gguf), **options) as screened, LLM(str(demo_gguf), greedy_screen=False, **options) as whole:
        assert screened.engine.executor.greedy_bytes < whole.engine.executor.greedy_bytes
        assert screened.generate("The sea is", greedy)[0].outputs == whole.generate("The sea is", greedy)[0].outputs
    assert len(made) == (0 if at_first else 1)
    assert file.read_bytes() == kept


def test_a_damaged_file_is_replaced(demo_gguf: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = logits(demo_gguf)
    (file,) = folder.glob("*.packed")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-40] + bytes(40), whole[:-1] + b"2"):
        file.write_bytes(damaged)
        caplog.clear()
        assert np.array_equal(logits(demo_gguf), first)
        assert "made anew" in caplog.text
        assert file.read_bytes() == whole


def test_nothing_is_kept_when_it_is_not_wanted(demo_gguf: Path, folder: Path) -> None:
    logits(demo_gguf, keep_packed=False)
    assert not folder.exists()


def test_the_folder_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "FOLDER_BOUND", 100)
    for age, name in enumerate(("new", "old")):
        path = tmp_path / f"{name}.packed"
        path.write_bytes(bytes(40))
        os.utime(path, (1000 - age, 1000 - age))
    packed._make_room(tmp_path, 50)
    assert [path.name for path in tmp_path.iterdir()] == ["new.packed"]


def test_llm_leaves_the_disk_alone_when_asked(demo_gguf: Path, folder: Path) -> None:
    options = {"max_model_len": 64, "max_num_seqs": 1, "threads": 1}
    with LLM(str(demo_gguf), keep_packed=False, **options):
        assert not folder.exists()
    with LLM(str(demo_gguf), **options):
        assert list(folder.glob("*.packed"))
