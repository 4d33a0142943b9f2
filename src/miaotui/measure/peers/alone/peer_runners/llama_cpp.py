"""llama.cpp, driven through llama-cpp-python's low-level bindings as `llama-batched-bench` drives it.

All prompts are read in full batches, then every step decodes one token of every sequence. Greedy picks are one
vectorised argmax over the logits of a step, which is faster than llama.cpp's own sampler chain row by row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from .worker import Config, Generation, serve

BATCH = 512
"""n_batch and n_ubatch: tokens in one step at most."""
ERROR = 4
"""ggml's log level."""

Row = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether its logits are wanted."""


class LlamaCpp:
    def __init__(self, config: Config) -> None:
        self.config = config
        llama_cpp.llama_log_set(_quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.use_mmap, params.use_mlock = 0, True, False
        self.model = llama_cpp.llama_model_load_from_file(config.weights.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {config.weights}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.contexts: dict[int, Any] = {}
        self.settings = {
            "n_batch": BATCH, "n_ubatch": BATCH, "flash_attn": True, "type_k": "f16", "type_v": "f16",
            "kv_unified": False, "mlock": False, "threads": config.threads,
        }  # fmt: skip
        self.facts = {"system": llama_cpp.llama_print_system_info().decode()}

    def context(self, streams: int, length: int) -> Any:
        """The context for that many sequences: the last one made when it fits, else a new one in its place."""
        known = self.contexts.get(streams)
        if known is not None and known[1] >= length:
            return known[0]
        if known is not None:
            llama_cpp.llama_free(known[0])
        params = llama_cpp.llama_context_default_params()
        length = -(-length // 256) * 256
        params.n_ctx, params.n_seq_max = streams * length, streams
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self.config.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {streams} × {length} positions")
        self.contexts[streams] = (context, length)
        return context

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        longest = max(len(prompt) for prompt in prompts)
        context = self.context(len(prompts), longest + new_tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        started = time.perf_counter()
        latest = self._read(context, prompts)
        arrivals = [time.perf_counter() - started]
        columns = [latest]
        ends = [len(prompt) for prompt in prompts]
        for step in range(new_tokens - 1):
            rows = [
                (int(token), end + step, seq, True) for seq, (token, end) in enumerate(zip(latest, ends, strict=True))
            ]
            latest = self._decode(context, rows)
            columns.append(latest)
            arrivals.append(time.perf_counter() - started)
        ids: list[list[int]] = np.stack(columns, axis=1).tolist()
        return Generation(arrivals[-1], ids, arrivals if len(prompts) == 1 else [])

    def _read(self, context: Any, prompts: Sequence[Sequence[int]]) -> Any:
        """Decode all prompts in batches; the first new token of each."""
        rows: list[Row] = [
            (token, position, seq, position == len(prompt) - 1)
            for seq, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found = [self._decode(context, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        return np.concatenate(found)

    def _decode(self, context: Any, rows: Sequence[Row]) -> Any:
        """One step; the likeliest next token of every row that wants one, in order `[wanted]`."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        count = sum(row[3] for row in rows)
        if not count:
            return np.empty(0, np.int64)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (count, self.vocab))
        return logits.argmax(axis=1)


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user: Any) -> None:
    """Errors go to the log; how a model is made up does not."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


if __name__ == "__main__":
    serve(LlamaCpp, ["llama-cpp-python"])
