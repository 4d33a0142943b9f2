"""transformers, with compressed-tensors: float32 products over the weights as the file has them."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.interop_kit.answer import Request, Top1, answer

BATCH = 4
"""Windows at once: integer weights are decoded anew for each call."""


@torch.inference_mode()
def ask(request: Request) -> Top1:
    torch.set_num_threads(request.threads)
    model = AutoModelForCausalLM.from_pretrained(request.path, dtype=torch.float32).eval()
    found: list[list[int]] = []
    for start in range(0, len(request.windows), BATCH):
        logits = model(torch.tensor(request.windows[start : start + BATCH])).logits
        found += logits[:, :-1].argmax(-1).tolist()
    return found, {"dtype": "float32"}


if __name__ == "__main__":
    answer(ask, ["transformers", "compressed-tensors", "torch"])
