"""Cache blocks as bytes: every backend gives back what it was given, and the demo model answers from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miaotui import LLM, SamplingParams
from miaotui.backends.ops import Attention, CacheSpec, CacheType, Executor
from miaotui.model.build import load
from tests.golden.paged import Paged

PROMPT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.mark.parametrize(("device", "kind"), [("cpu", "fp32"), ("cpu", "bf16"), ("cpu", "int8"), ("reference", "fp32")])
def test_a_block_moves_between_caches(demo_gguf: Path, device: str, kind: str) -> None:
    """A prompt's blocks, read from one place, wiped and written to another, give the same logits."""
    if device == "reference":
        pytest.importorskip("torch", reason="the reference backend needs PyTorch")
    loaded = load(str(demo_gguf), device=device, kv_cache_dtype=kind, compute="fp32", max_model_len=64)
    executor: Executor = loaded.executor
    prompt = loaded.tokenizer.encode(PROMPT)[:33]
    paged = Paged(1, 48)
    executor.allocate_cache(paged.blocks)
    whole = executor.run(paged.step([(0, prompt)]))[-1].copy()
    before = paged.table[0].tolist()
    content = [executor.read_block(block) for block in before]
    assert all(block.nbytes == executor.block_bytes and block.any() for block in content)
    for block in before:
        executor.write_block(block, np.zeros_like(content[0]))
    paged.table[0] = before[1:] + before[:1]
    for block, bytes_ in zip(paged.table[0].tolist(), content, strict=True):
        executor.write_block(block, bytes_)
    paged.done[0] = 32
    again = executor.run(paged.step([(0, prompt[32:])]))[-1]
    assert np.allclose(whole, again, rtol=0, atol=1e-3 if device == "reference" else 0.0)
    if device == "cpu":
        with pytest.raises(ValueError, match="another size"):
            executor.write_block(0, content[0][:-1])
        with pytest.raises(IndexError):
            executor.read_block(10_000)
    executor.close()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_the_reference_cache_as_bytes(kind: CacheType) -> None:
    torch = pytest.importorskip("torch", reason="the reference backend needs PyTorch")
    from miaotui.backends.reference.cache import Cache

    spec = CacheSpec(tuple(Attention(4, kv, 8, 1.0, None) for kv in (1, 2)), kind)
    cache = Cache(spec, torch.device("cpu"))
    cache.allocate(3)
    content = np.random.default_rng(0).integers(0, 256, cache.block_bytes).astype(np.uint8)
    cache.write(1, content)
    assert np.array_equal(cache.read(1), content)
    assert not cache.read(0).any()
    assert not cache.read(2).any()


def test_the_demo_answers_from_a_file(demo_gguf: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_model_len": 512, "prefix_cache_file": tmp_path / "p"}
    answers = []
    for wanted in (0, 64):
        with LLM(str(demo_gguf), **options) as llm:
            (output,) = llm.generate(PROMPT, GREEDY)
            answers.append(output.outputs[0].token_ids)
            assert output.num_cached_tokens == wanted
            assert llm.engine.stats.blocks_paged_in == wanted // 16
    assert answers[0] == answers[1]
    with LLM(str(demo_gguf), kv_cache_dtype="int8", **options) as llm:
        assert llm.generate(PROMPT, GREEDY)[0].num_cached_tokens == 0, "another cache type, another file"
