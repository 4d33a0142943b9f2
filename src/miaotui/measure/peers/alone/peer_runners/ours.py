"""Miaotui, as a program that uses its public API gets it."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

from .worker import Config, Generation, serve

BATCH = 512
"""Tokens in one step at most."""


class Ours:
    def __init__(self, config: Config) -> None:
        from miaotui import LLM

        options: dict[str, Any] = {
            "threads": config.threads,
            "max_model_len": config.length,
            "max_num_seqs": config.streams,
            "max_num_batched_tokens": BATCH,
            "enable_prefix_caching": False,
            **config.options,
        }
        self.llm = LLM(config.weights, **options)
        gc.freeze()  # as the command line does: no collection between two tokens walks what is here to stay
        executor = self.llm.engine.executor
        self.settings = options
        self.facts = {name: getattr(executor, name) for name in ("weight_bytes", "block_bytes", "greedy_bytes")}

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        from miaotui import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        if len(prompts) == 1:
            return self._stream(list(prompts[0]), params)
        started = time.perf_counter()
        outputs = self.llm.generate([list(prompt) for prompt in prompts], params)
        seconds = time.perf_counter() - started
        return Generation(seconds, [list(output.outputs[0].token_ids) for output in outputs])

    def _stream(self, prompt: list[int], params: Any) -> Generation:
        ids: list[int] = []
        arrivals: list[float] = []
        started = time.perf_counter()
        for output in self.llm.stream(prompt, params):
            new = [token for completion in output.outputs for token in completion.token_ids]
            arrivals += [time.perf_counter() - started] * len(new)
            ids += new
        return Generation(time.perf_counter() - started, [ids], arrivals)


if __name__ == "__main__":
    serve(Ours, ["miaotui"])
