"""A 7B model's shape, with random weights, through a whole compression: does it keep within its memory?

    python -m benchmarks.large_shape [--layers 32] [--method gptq] [--windows 8] [--bound 8e9] [--folder DIR]

Memory is that of one layer whatever their number; the time is not. The folder is written once (13.5 GB at 32 layers)
and removed at the end unless `--keep`. Exit status 1 above the bound.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.quantise import MIAOTUI, run
from miaotui.checkpoint.write import Stored, atomic_folder, write_json, write_sharded
from miaotui.model.families import spec_of_config
from miaotui.model.names import HF
from miaotui.model.shapes import shapes
from miaotui.quant.rounding import bfloat16_bits

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def write(folder: Path, layers: int) -> None:
    """Llama-2-7B's shapes; every layer has the same random weights, which are drawn once."""
    config = {**CONFIG, "num_hidden_layers": layers}
    drawn: dict[tuple[str, tuple[int, ...]], NDArray[np.uint16]] = {}

    def load(name: str) -> NDArray[np.uint16]:
        shape = sizes[name]
        key = (name.rpartition(".layers.")[2].partition(".")[2] or name, shape)
        if key not in drawn:
            random = np.random.default_rng(len(drawn))
            values = random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
            drawn[key] = bfloat16_bits(np.ones(shape, np.float32) if "norm" in name else values)
        return drawn[key]

    sizes = dict(shapes(spec_of_config(config), HF))
    with atomic_folder(folder) as building:
        write_sharded(building, [Stored(name, "BF16", shape) for name, shape in sizes.items()], load)
        write_json(building / "config.json", config)
        _write_tokenizer(building)


def _write_tokenizer(folder: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(CONFIG["vocab_size"])}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bound", type=float, default=8e9)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as work:
        here = Path(work)
        model = (asked.folder or here) / f"shape-7b-{asked.layers}"
        if not model.exists():
            write(model, asked.layers)
        found = compress(model, here, asked.method, asked.windows)
        if not asked.keep:
            shutil.rmtree(model)
    print(json.dumps(found, indent=2))
    return int(found["peak_bytes"] > asked.bound)


def compress(model: Path, work: Path, method: str, windows: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    text = " ".join(f"w{i}" for i in random.integers(0, CONFIG["vocab_size"], 600 * windows))
    (work / "text.txt").write_text(text)
    calibration = {"source": str(work / "text.txt"), "windows": windows, "window": 512}
    (work / "recipe.yaml").write_text(yaml.safe_dump({"method": method, "calibration": calibration}))
    argv = [*MIAOTUI, "compress", str(model), "--recipe", str(work / "recipe.yaml"), "-o", str(work / "out"), "--json"]
    seconds, peak, printed = run(argv, {"MIAOTUI_HOME": str(work / "home")})
    report = json.loads(printed)
    return {
        "method": method, "windows": windows, "seconds": seconds, "stages": report["seconds"], "peak_bytes": peak,
        "estimated_bytes": report["estimate"]["memory"], "bytes": report["bytes"],
        "source_bytes": report["source_bytes"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
