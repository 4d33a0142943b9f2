"""Many prompts × 64 greedy tokens against transformers in float32, in every way of running.

    python -m benchmarks.greedy_equality --prompts PROMPTS.jsonl [--count 40]

PROMPTS.jsonl has a `category` and `turns` (the first is asked) on each line; prompts are drawn evenly over the
categories. Exits 1 when an answer differs where the oracle's two best logits are more than 1e-4 apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer
from tests.golden.greedy import SETTINGS, expect, oracle, run

LONGEST = 900
"""Prompts of more tokens are passed over, so that the float32 oracle stays quick."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    gguf = resolve("demo")
    checkpoint = open_checkpoint(gguf)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    template = ChatTemplate.from_checkpoint(checkpoint, tokenizer)
    prompts = [template.encode([{"role": "user", "content": text}]) for text in _draw(args.prompts)]
    chosen = [prompt for prompt in prompts if len(prompt) <= LONGEST][: args.count]
    model = oracle(gguf)
    expected = [expect(model, prompt, args.tokens, tokenizer.eos_ids) for prompt in chosen]
    print(f"{len(chosen)} prompts of {min(map(len, chosen))} to {max(map(len, chosen))} tokens")
    failed = False
    for setting in SETTINGS:
        outcome = run(setting, str(gguf), expected, args.tokens)
        failed |= bool(outcome.divergences)
        print(
            f"{setting}: {len(outcome.divergences)} divergences, {len(outcome.ties)} at ties, "
            f"{outcome.preemptions} preemptions, {outcome.prefix_hits} tokens from prefixes"
        )
        for line in (*outcome.divergences, *outcome.ties):
            print("   ", line)
    return int(failed)


def _draw(path: Path) -> list[str]:
    """First turns, one category after another in rotation."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_category[row["category"]].append(row["turns"][0])
    depth = max(map(len, by_category.values()))
    return [texts[i] for i in range(depth) for texts in by_category.values() if i < len(texts)]


if __name__ == "__main__":
    sys.exit(main())
