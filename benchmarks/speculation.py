"""Prompt look-up against plain decoding, category by category: greedy, one stream, the same answers.

    python -m benchmarks.speculation --prompts PROMPTS.jsonl [--each 10] [--tokens 128] [--rounds 3]

PROMPTS.jsonl has a `category` and `turns` (the first is asked) on each line. Every prompt is answered plainly and with
look-up in turn, `rounds` times each way, and its best time each way counts; a category's figure is the ratio of its
sums. Exits 1 when an answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from miaotui import LLM, SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--each", type=int, default=10, help="prompts of each category")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    same, sums = True, {}
    options = {"max_num_seqs": 1, "max_model_len": 4096, "enable_prefix_caching": False}
    with LLM("demo", **options) as plain, LLM("demo", speculative="ngram", **options) as guessing:
        for category, texts in _by_category(args.prompts).items():
            times = [0.0, 0.0]
            for text in texts[: args.each]:
                best, answers = [float("inf")] * 2, [[], []]
                for _ in range(args.rounds):
                    for side, llm in enumerate((plain, guessing)):
                        seconds, answers[side] = _answer(llm, text, params)
                        best[side] = min(best[side], seconds)
                same &= answers[0] == answers[1]
                times = [total + seconds for total, seconds in zip(times, best, strict=True)]
            sums[category] = times
            print(f"{category:16} {times[0] / times[1]:.2f}×", flush=True)
        stats = guessing.engine.stats
    whole = [sum(side) for side in zip(*sums.values(), strict=True)]
    print(f"{'all':16} {whole[0] / whole[1]:.2f}×; {stats.drafts_accepted} of {stats.tokens_drafted} guesses came true")
    print("the same answers" if same else "ANSWERS DIFFER")
    return 0 if same else 1


def _answer(llm: LLM, text: str, params: SamplingParams) -> tuple[float, list[int]]:
    """Seconds for the whole answer, prompt included, and its tokens."""
    started = time.perf_counter()
    (output,) = llm.chat([{"role": "user", "content": text}], params)
    return time.perf_counter() - started, list(output.outputs[0].token_ids)


def _by_category(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["category"]].append(row["turns"][0])
    return found


if __name__ == "__main__":
    sys.exit(main())
