"""The engine on the real demo model: token for token what transformers answers, however it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the oracle is transformers on PyTorch")
pytest.importorskip("transformers", reason="the oracle is transformers on PyTorch")

from miaotui.checkpoint import open_checkpoint
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer
from tests.golden.greedy import SETTINGS, Expected, expect, oracle, run

COUNT = 24
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that reverses a linked list.",
    "用一句话介绍北京。",
    "Summarise: The mitochondrion is an organelle found in the cells of most eukaryotes. It makes most of the cell's "
    "supply of adenosine triphosphate, which is used as a source of chemical energy. Mitochondria were first "
    "described in the nineteenth century, and the term was coined in 1898 by Carl Benda.",
    "A train leaves at 9:40 and arrives at 12:05. How long is the journey?",
    "List three uses of a paperclip 📎, each on its own line:\n1.",
)


@pytest.fixture(scope="module")
def expected(demo_gguf: Path) -> list[Expected]:
    checkpoint = open_checkpoint(demo_gguf)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    template = ChatTemplate.from_checkpoint(checkpoint, tokenizer)
    model = oracle(demo_gguf)
    prompts = [template.encode([{"role": "user", "content": text}]) for text in PROMPTS]
    return [expect(model, prompt, COUNT, tokenizer.eos_ids) for prompt in prompts]


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_equals_transformers(setting: str, demo_gguf: Path, expected: list[Expected]) -> None:
    outcome = run(setting, str(demo_gguf), expected, COUNT)
    assert not outcome.divergences
    assert (outcome.preemptions > 0) == (setting == "forced preemption")
    assert (outcome.prefix_hits > 0) == (setting == "prefix hits")
