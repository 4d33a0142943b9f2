"""What an artefact recommends is what a command gets, on a machine like the one it was found on."""

from __future__ import annotations

from pathlib import Path

import pytest

from miaotui.checkpoint import serving
from miaotui.errors import CheckpointError

OPTIONS = {"compute": "fp32", "kv_cache_dtype": "int8", "speculative": "ngram", "max_num_batched_tokens": 256}


def test_round_trip(tmp_path: Path) -> None:
    serving.write(tmp_path, {**OPTIONS, "threads": 3}, cores=2)
    assert serving.read(tmp_path, cores=2) == {**OPTIONS, "threads": 3}


def test_threads_stay_where_they_were_measured(tmp_path: Path) -> None:
    serving.write(tmp_path, {**OPTIONS, "threads": 3}, cores=2)
    assert serving.read(tmp_path, cores=8) == OPTIONS


def test_nothing_to_recommend(tmp_path: Path) -> None:
    assert serving.write(tmp_path, {}, cores=2) is None
    assert serving.read(tmp_path, cores=2) == {}
    assert not list(tmp_path.iterdir())


def test_beside_a_file_of_weights(tmp_path: Path) -> None:
    weights = tmp_path / "fast.gguf"
    weights.touch()
    assert serving.write(weights, OPTIONS, cores=2) == tmp_path / "fast.serving.json"
    assert serving.read(weights, cores=2) == OPTIONS


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"options": []}', '{"options": {"device": "cuda"}}', '{"options": {"max_num_seqs": true}}',
     '{"options": {}, "threads": 0, "cores": 2}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / serving.FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"serving\.json cannot be read: .*Remove it"):
        serving.read(tmp_path, cores=2)
