"""Small random Llamas as Hugging Face folders, written by hand: no transformers, and any weights one likes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.write import Stored, write_safetensors
from miaotui.model.families import spec_of_config
from miaotui.model.names import HF
from miaotui.model.shapes import shapes
from miaotui.quant.rounding import bfloat16_bits

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "dtype": "float32",
}

Arrays = dict[str, NDArray[np.float32]]


def draw(config: Mapping[str, Any], seed: int, near: Arrays | None = None, spread: float = 0.02) -> Arrays:
    """Random weights; or `near` with random changes, of which some are large."""
    random = np.random.default_rng(seed)
    made: Arrays = {}
    for name, shape in shapes(spec_of_config(config), HF):
        if near is not None:
            made[name] = near[name] + random.standard_t(3, shape).astype(np.float32) * np.float32(spread)
        elif name.endswith("norm.weight"):
            made[name] = 1 + random.standard_normal(shape).astype(np.float32) * np.float32(0.1)
        else:
            made[name] = random.standard_normal(shape).astype(np.float32) * np.float32(shape[-1] ** -0.5)
    return made


def write(
    folder: Path,
    arrays: Arrays,
    config: Mapping[str, Any] = CONFIG,
    *,
    kind: str = "F32",
    vocabulary: Mapping[str, int] | None = None,
) -> Path:
    """A folder with these weights, and a tokenizer of whole words."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    stored = [Stored(name, kind, array.shape) for name, array in arrays.items()]
    as_stored = bfloat16_bits if kind == "BF16" else np.asarray
    write_safetensors(folder / "model.safetensors", stored, lambda name: as_stored(arrays[name]))
    write_tokenizer(folder, vocabulary or {f"w{i}": i for i in range(config["vocab_size"])})
    return folder


def write_tokenizer(folder: Path, vocabulary: Mapping[str, int]) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def read(folder: Path) -> Arrays:
    """All tensors of a folder, as transformers would see them."""
    from miaotui.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name).dense32().copy() for name in checkpoint.names()}
