"""llama.cpp, through llama-cpp-python's low-level bindings: logits of every position of a window.

Mode `served` multiplies blocks with activations rounded to int8, as llama.cpp does. In mode `float32` llama.cpp first
turns the file's blocks into float32 itself (what `llama-quantize --allow-requantize FILE OUT F32` does).
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.interop_kit.answer import Request, Top1, answer


def ask(request: Request) -> Top1:
    llama_cpp.llama_log_set(_quiet, None)
    llama_cpp.llama_backend_init()
    if request.mode != "float32":
        return _ask(request, request.path), {"activations": "int8", "kv": "f32"}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "dense.gguf"))
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
        params.nthread = request.threads
        status = llama_cpp.llama_model_quantize(request.path.encode(), path.encode(), ctypes.byref(params))
        if status:
            raise RuntimeError(f"llama_model_quantize gave {status}")
        return _ask(request, path), {"activations": "float32", "kv": "f32"}


def _ask(request: Request, path: str) -> list[list[int]]:
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {request.path}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    length = max(map(len, request.windows))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = -(-length // 256) * 256
    params.n_threads = params.n_threads_batch = request.threads
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    found = []
    for window in request.windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for at, token in enumerate(window):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, True
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(window), vocabulary))
        found.append(logits[:-1].argmax(axis=1).tolist())
    return found


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user: object) -> None:
    """Errors only."""
    if level == 4:
        print(text.decode(errors="replace"), end="", flush=True)


if __name__ == "__main__":
    answer(ask, ["llama-cpp-python"])
