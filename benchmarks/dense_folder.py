"""The demo model dequantised to bfloat16, as a Hugging Face folder: what compression is measured on.

    python -m benchmarks.dense_folder [FOLDER]

Its matrices become plain numbers, its rows of Q and K the two halves of a head one after the other, its tokenizer a
`tokenizer.json`. transformers, llm-compressor and Miaotui load it alike.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import Checkpoint, open_checkpoint, resolve
from miaotui.checkpoint.write import Stored, atomic_folder, write_json, write_sharded
from miaotui.model.families import describe, read_spec
from miaotui.model.names import HF
from miaotui.model.shapes import shapes
from miaotui.model.tokenizer import Tokenizer
from miaotui.model.weights import halves
from miaotui.quant.rounding import bfloat16_bits

DEFAULT = Path(os.environ.get("MIAOTUI_HOME", "~/.cache/miaotui")).expanduser() / "bench" / "smollm2-bf16"


def dense_folder(folder: Path = DEFAULT) -> Path:
    """The folder, written the first time it is asked for (270 MB)."""
    if (folder / "config.json").is_file():
        return folder
    source = open_checkpoint(resolve("demo"))
    spec, names = read_spec(source)
    twins = dict(zip((n for n, _ in shapes(spec, HF)), (n for n, _ in shapes(spec, names)), strict=True))

    def load(name: str) -> NDArray[np.uint16]:
        tensor, a = source.tensor(twins[name]), spec.layers[0].attention
        for part, heads in (("q_proj", a.heads), ("k_proj", a.kv_heads)):
            if part in name:
                tensor = tensor.rows(halves(heads, a.head_dim))
        return bfloat16_bits(np.ascontiguousarray(tensor.dense32()))

    with atomic_folder(folder) as building:
        write_sharded(building, [Stored(name, "BF16", shape) for name, shape in shapes(spec, HF)], load)
        _write_text_files(building, source)
    return folder


def _write_text_files(folder: Path, source: Checkpoint) -> None:
    settings = dict(describe(source).settings)
    rope = settings.pop("rope_parameters")
    for key in ("rotary_dim", "qkv_bias", "out_bias", "mlp_bias"):
        del settings[key]
    tokenizer = Tokenizer.from_checkpoint(source)
    special = tokenizer.special_tokens
    ids = {f"{name}_id": tokenizer.backend.token_to_id(special[name]) for name in ("bos_token", "eos_token")}
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 8)
    write_json(folder / "config.json", {**model, **settings, "hidden_act": "silu", **rope, **ids})
    write_json(folder / "generation_config.json", ids)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    chat = source.config["tokenizer.chat_template"]
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": settings["max_position_embeddings"]}
    write_json(folder / "tokenizer_config.json", {**kind, **special, "chat_template": chat})


def texts(path: Path) -> Iterator[str]:
    """The first three quarters of a text, to calibrate on, and its last quarter, to measure on; cut between lines."""
    text = path.read_text(encoding="utf-8")
    cut = text.index("\n", len(text) * 3 // 4) + 1
    yield from (text[:cut], text[cut:])


if __name__ == "__main__":
    print(json.dumps(str(dense_folder(*map(Path, sys.argv[1:])))))
