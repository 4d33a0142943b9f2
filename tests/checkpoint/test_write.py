"""Writing: whole or not at all; errors leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.write import Blocked, Stored, atomic_file, atomic_folder, write_gguf, write_safetensors
from miaotui.errors import UsageError
from miaotui.quant.tensor import DenseTensor
from tests.checkpoint.making import random, write_config


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(bytes([1 // 0]))
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(FileNotFoundError), atomic_folder(target) as building:
        (building / "absent" / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as building:
        (building / "a").write_text("1")
    assert (target / "a").read_text() == "1"
    with pytest.raises(UsageError, match="there already"), atomic_folder(target):
        pass
    with atomic_folder(target, replace=True) as building:
        (building / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_folder_may_be_written_into(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "model") as building:
        (building / "a").write_text("1")
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as building:
        (building / "a").write_text("1")
    assert (tmp_path / "empty" / "a").exists()


def test_tensors_are_asked_for_one_at_a_time_and_checked(tmp_path: Path) -> None:
    asked = []

    def load(name: str) -> np.ndarray:
        asked.append(name)
        return random((2, 2))

    stored = [Stored("b", "F32", (2, 2)), Stored("a", "F32", (2, 2))]
    write_config(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", stored, load, {"made_by": "test"})
    assert asked == ["a", "b"]
    assert open_checkpoint(tmp_path).names() == ["a", "b"]
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "x.safetensors", [Stored("a", "F32", (3,))], load)
    assert not (tmp_path / "x.safetensors").exists()


def test_every_metadata_type_of_gguf(tmp_path: Path) -> None:
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64)
    metadata = {f"scalar.{kind.__name__}": kind(7) for kind in kinds}
    metadata |= {f"array.{kind.__name__}": np.arange(3).astype(kind) for kind in kinds}
    tensor = DenseTensor("float32", random((2, 3)))
    write_gguf(tmp_path / "all.gguf", metadata, [Blocked("x", "F32", (2, 3))], lambda name: tensor)
    read = open_checkpoint(tmp_path / "all.gguf").config
    for kind in kinds:
        assert read[f"scalar.{kind.__name__}"] == 7
        assert read[f"array.{kind.__name__}"].dtype == kind
        np.testing.assert_array_equal(read[f"array.{kind.__name__}"], np.arange(3))
    with pytest.raises(UsageError, match="does not fit"):
        write_gguf(tmp_path / "x.gguf", {"n": 1 << 70}, [], lambda name: tensor)
