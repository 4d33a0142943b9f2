"""OpenVINO GenAI, which reads the GGUF file itself: its continuous-batching pipeline on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from .worker import Config, Generation, serve

BATCH = 512
"""Tokens in one step at most."""
CACHE_GIB = 2


class Clock(openvino_genai.StreamerBase):
    """Notes when each new token is handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, tokens: int | Sequence[int]) -> Any:
        count = 1 if isinstance(tokens, int) else len(tokens)
        self.times += [time.perf_counter()] * count
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back, so nothing is left to hand out."""


class OpenVino:
    """Two pipelines: decoding at batch 1 is faster in float32, all else in what OpenVINO chooses itself."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.default = self._pipeline(config.streams)
        self.exact = self._pipeline(1, INFERENCE_PRECISION_HINT="f32")
        self.settings = {
            "max_num_batched_tokens": BATCH, "max_num_seqs": config.streams, "cache_size": CACHE_GIB,
            "precision": "f32 for decode-1, else OpenVINO's choice", "threads": config.threads,
            "enable_prefix_caching": False,
        }  # fmt: skip
        self.facts: dict[str, Any] = {}

    def _pipeline(self, streams: int, **properties: Any) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs = BATCH, streams
        scheduler.enable_prefix_caching = False
        properties["INFERENCE_NUM_THREADS"] = self.config.threads
        return openvino_genai.ContinuousBatchingPipeline(self.config.weights, scheduler, "CPU", properties)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = new_tokens, True, False
        pipeline = self.exact if len(prompts) == 1 and new_tokens > 1 else self.default
        clock = Clock() if len(prompts) == 1 else None
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        started = time.perf_counter()
        found = pipeline.generate(inputs, [settings] * len(prompts), clock)
        seconds = time.perf_counter() - started
        arrivals = [moment - started for moment in clock.times] if clock else []
        return Generation(seconds, [list(result.m_generation_ids[0]) for result in found], arrivals)


if __name__ == "__main__":
    serve(OpenVino, ["openvino-genai", "openvino"])
