"""transformers, with compressed-tensors: float32 products over the weights as the file has them."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.interop_kit.answer import Request, Top1, answer


@torch.inference_mode()
def ask(request: Request) -> Top1:
    torch.set_num_threads(request.threads)
    model = AutoModelForCausalLM.from_pretrained(request.path, dtype=torch.float32).eval()
    found = [model(torch.tensor([window])).logits[0, :-1].argmax(-1).tolist() for window in request.windows]
    return found, {"dtype": "float32"}


if __name__ == "__main__":
    answer(ask, ["transformers", "compressed-tensors", "torch"])
