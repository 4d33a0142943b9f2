"""Every family against transformers: logits of a tiny random model, from safetensors and GGUF, on every backend."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference figures come from PyTorch and transformers")
pytest.importorskip("transformers", reason="the reference figures come from transformers")

from miaotui.checkpoint import open_checkpoint  # noqa: E402
from miaotui.model.build import build  # noqa: E402
from tests.golden import gguf_files, models, paged  # noqa: E402

TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit."""


def backends() -> list[str]:
    """`cpu` too, once its native module is built."""
    try:
        import miaotui.backends.cpu  # noqa: F401
    except ImportError:
        return ["reference"]
    return ["reference", "cpu"]


@cache
def original(case: models.Case) -> tuple[Any, list[list[int]], list[np.ndarray]]:
    """The model, two sequences of different lengths, and transformers' logits for them."""
    model = models.make(case)
    sequences = [models.tokens(case), models.tokens(case, seed=2)[: case.length - 13]]
    if case.prefix == "Phi3" and "long" in case.name:  # one set of factors for all, see model.rope
        sequences[1] = models.tokens(case, seed=2)[: case.length - 2]
    if "dynamic" in case.name:
        sequences[1] = models.tokens(case, seed=2)
    return model, [s.tolist() for s in sequences], [models.logits(model, s).numpy() for s in sequences]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def checkpoint(folder: Path, case: models.Case, kind: str) -> Any:
    """The model's file, written once."""
    path = folder / case.name
    model, _, _ = original(case)
    if kind == "gguf":
        path = path.with_suffix(".gguf")
        if not path.exists():
            gguf_files.write(model, case, path)
    elif not path.exists():
        model.save_pretrained(path)
    return open_checkpoint(path)


FILES = [(case, kind) for case in models.CASES for kind in ("safetensors", "gguf") if kind != "gguf" or case.gguf]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("case", "kind"), FILES, ids=lambda x: getattr(x, "name", x))
def test_logits_equal_those_of_transformers(folder: Path, case: models.Case, kind: str, backend: str) -> None:
    _, sequences, expected = original(case)
    _, executor = build(
        checkpoint(folder, case, kind),
        device=backend,
        compute="fp32",
        kv_cache_dtype="fp32",
        max_model_len=case.length,
        max_num_batched_tokens=96,
        max_num_seqs=2,
        max_logits_rows=96,
        threads=1,
    )
    try:
        chunks = [17, 3, 21] if case.length < 100 else [40, 5, 33, 48, 17]
        found = paged.whole(executor, sequences, chunks)
    finally:
        executor.close()
    for have, want in zip(found, expected, strict=True):
        assert np.abs(have - want).max() < TOLERANCE * np.abs(want).max()
