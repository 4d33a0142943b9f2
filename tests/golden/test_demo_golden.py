"""The demo model against transformers, on the weights that the `gguf` package reads from the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference figures come from PyTorch and transformers")
pytest.importorskip("transformers", reason="the reference figures come from transformers")
pytest.importorskip("gguf", reason="the weights are read by the gguf package")

from miaotui.backends.ops import Executor  # noqa: E402
from miaotui.model.build import load  # noqa: E402
from tests.golden.greedy import oracle  # noqa: E402
from tests.golden.paged import Paged  # noqa: E402
from tests.golden.test_families_golden import backends  # noqa: E402

PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "秒推 means")
NEW = 16
CLOSE = 1e-4
"""Two best logits nearer than this may change places."""


@pytest.fixture(scope="module")
def original(demo_gguf: Path) -> Any:
    return oracle(demo_gguf)


def greedy(executor: Executor, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts in one batch."""
    paged = Paged(len(prompts), max(map(len, prompts)) + NEW)
    executor.allocate_cache(paged.blocks)
    ends = np.cumsum([len(prompt) for prompt in prompts]) - 1
    logits = executor.run(paged.step(list(enumerate(prompts)), rows=ends.tolist()))
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW):
        for tokens, row in zip(out, logits, strict=True):
            tokens.append(int(row.argmax()))
        logits = executor.run(paged.step([(s, tokens[-1:]) for s, tokens in enumerate(out)]))
    return out


@pytest.mark.parametrize("backend", backends())
def test_greedy_tokens_equal_those_of_transformers(demo_gguf: Path, original: Any, backend: str) -> None:
    loaded = load(str(demo_gguf), device=backend, compute="fp32", kv_cache_dtype="fp32", max_model_len=256, threads=1)
    prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    try:
        answers = greedy(loaded.executor, prompts)
    finally:
        loaded.executor.close()
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            rows = original(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        best = rows.topk(2, dim=1)
        for token, (first, second), (top, _) in zip(answer, best.values.tolist(), best.indices.tolist(), strict=True):
            assert token == top or first - second < CLOSE
