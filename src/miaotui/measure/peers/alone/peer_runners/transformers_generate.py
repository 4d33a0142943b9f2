"""transformers: `model.generate` in bfloat16, as its documentation shows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from .worker import Config, Generation, serve


class Clock(BaseStreamer):
    """Notes when each new token is handed out; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: Any) -> None:
        if not self.prompt:
            self.times.append(time.perf_counter())
        self.prompt = False

    def end(self) -> None:
        """Nothing is held back, so nothing is left to hand out."""


class Transformers:
    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.threads)
        self.model = AutoModelForCausalLM.from_pretrained(config.weights, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        attention = self.model.config._attn_implementation
        self.settings = {"dtype": "bfloat16", "attention": attention, "threads": config.threads}
        self.facts: dict[str, Any] = {}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        ids = torch.tensor([list(prompt) for prompt in prompts])
        clock = Clock() if len(prompts) == 1 else None
        started = time.perf_counter()
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=clock
        )
        seconds = time.perf_counter() - started
        arrivals = [moment - started for moment in clock.times] if clock else []
        return Generation(seconds, output[:, ids.shape[1] :].tolist(), arrivals)


if __name__ == "__main__":
    serve(Transformers, ["transformers", "torch"])
