"""Tiny checkpoints for tests: what a folder or a GGUF file must have to be opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.write import Blocked, Stored, write_gguf, write_safetensors
from miaotui.quant import pack
from miaotui.quant.rounding import bfloat16_bits, round_to_nearest
from miaotui.quant.tensor import BlockTensor, DenseTensor

Typed = tuple[str, NDArray[Any]]
"""A safetensors type name and an array."""

NUMPY = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}


def typed(value: NDArray[Any] | Typed) -> Typed:
    return value if isinstance(value, tuple) else (NUMPY[str(value.dtype)], value)


def write_file(path: Path, tensors: Mapping[str, NDArray[Any] | Typed]) -> None:
    arrays = {name: typed(value) for name, value in tensors.items()}
    stored = [Stored(name, kind, array.shape) for name, (kind, array) in arrays.items()]
    write_safetensors(path, stored, lambda name: arrays[name][1])


def write_config(folder: Path, quantization: Mapping[str, Any] | None = None) -> None:
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 64}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def write_folder(
    folder: Path, tensors: Mapping[str, NDArray[Any] | Typed], quantization: Mapping[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, quantization)
    write_file(folder / "model.safetensors", tensors)
    return folder


def random(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def gguf_tensors(seed: int = 0) -> dict[str, DenseTensor | BlockTensor]:
    """One tensor of every dense type and of every block kind that we write."""
    weight = random((6, 64), seed)
    made: dict[str, DenseTensor | BlockTensor] = {
        "f32": DenseTensor("float32", random((5,), seed)),
        "f16": DenseTensor("float16", weight.astype(np.float16)),
        "bf16": DenseTensor("bfloat16", bfloat16_bits(weight)),
    }
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        made[kind.lower()] = pack.blocks(kind, round_to_nearest(weight, pack.KINDS[kind].scheme, "free"))
    return made


METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "a.negative": -7,
    "a.large": 1 << 40,
    "a.float": 0.5,
    "a.flag": True,
    "numbers": np.arange(5, dtype=np.int32),
    "flags": np.array([True, False]),
    "doubles": np.array([0.25], np.float64),
    "tokenizer.ggml.tokens": ["<s>", "Ġhello", "你好", "", "🙂"],
    "nested": [[1, 2], [3]],
    "nothing": [],
}


def write_tiny_gguf(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, DenseTensor | BlockTensor] | None = None,
) -> Path:
    made = gguf_tensors() if tensors is None else tensors
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    table = [
        Blocked(name, names[t.type] if isinstance(t, DenseTensor) else t.kind, t.shape) for name, t in made.items()
    ]
    write_gguf(path, METADATA if metadata is None else metadata, table, lambda name: made[name])
    return path
