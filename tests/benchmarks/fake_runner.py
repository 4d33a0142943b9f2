"""A runner for tests, run as a program: counts up from the prompt's last token. Odd prompts make trouble."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from miaotui.measure.peers.alone.peer_runners.worker import Config, Generation, serve

FAILS, DIES = 1_000_001, 1_000_002
"""Prompts that begin so."""


class Counter:
    def __init__(self, config: Config) -> None:
        if config.weights == "absent":
            raise FileNotFoundError("no such weights")
        print("what a library prints on stdout")
        self.settings: dict[str, Any] = {"threads": config.threads, "omp": os.environ["OMP_NUM_THREADS"]}
        self.facts = {"cpus": sorted(os.sched_getaffinity(0))}

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        if prompts[0][0] == FAILS:
            raise ValueError("such a prompt")
        if prompts[0][0] == DIES:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        ids = [[prompt[-1] + step + 1 for step in range(new_tokens)] for prompt in prompts]
        return Generation(0.5, ids, [0.1] * new_tokens if len(prompts) == 1 else [])


if __name__ == "__main__":
    serve(Counter, ["numpy"])
