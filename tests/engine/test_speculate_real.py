"""The demo model guessed at: the same tokens as without, for the logits of a row do not depend on other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miaotui import LLM, SamplingParams
from miaotui.engine.speculate import Speculator

TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n"
ASKED = [
    (TEXT, SamplingParams(temperature=0.0, max_tokens=40)),
    ("One two three one two three one two", SamplingParams(temperature=0.0, max_tokens=40, logprobs=1)),
    (TEXT, SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=40)),
    ("Repeat: cat, dog, cat, dog, cat,", SamplingParams(temperature=1.0, seed=2, max_tokens=30, n=2)),
    ("The list: 1, 2, 3, 1, 2, 3, 1,", SamplingParams(temperature=0.0, max_tokens=30, repetition_penalty=1.1)),
]


def answers(llm: LLM) -> list[Any]:
    outputs = llm.generate([prompt for prompt, _ in ASKED], [params for _, params in ASKED])
    return [(o.token_ids, o.text, o.logprobs) for output in outputs for o in output.outputs]


@pytest.mark.parametrize("compute", ["auto", "fp32"])
def test_the_demo_answers_alike(demo_gguf: Path, compute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 4, "compute": compute}
    with LLM(str(demo_gguf), **options) as llm:
        wanted = answers(llm)
    monkeypatch.setattr(Speculator, "_lengths", lambda self, tokens, rows, offers: offers)
    guesses: list[Any] = ["ngram"]
    if compute == "auto":
        guesses.append({"model": str(demo_gguf), "num_speculative_tokens": 3})
    for speculative in guesses:
        with LLM(str(demo_gguf), speculative=speculative, **options) as llm:
            assert answers(llm) == wanted
            stats = llm.engine.stats
            assert stats.drafts_accepted > 20
            assert speculative == "ngram" or stats.drafts_accepted > 0.8 * stats.tokens_drafted
            llm.engine.check_integrity()
