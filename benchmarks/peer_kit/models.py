"""The weights that engines are compared on, written once into the cache folder by our own writers.

- `demo_gguf`: the demo's weights rounded again to Q4_0, its embedding (which is also its head) kept Q8_0.
- `demo_bf16`: the very same rounded weights as a Hugging Face folder in bfloat16.
- `demo_int4`: the same codes and scales as a compressed-tensors folder, the head in bfloat16.
- `random_gguf`: random weights in the shape of a larger model, Q4_0 with tables in Q8_0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.write import Blocked, Stored, atomic_folder, write_gguf, write_json, write_safetensors
from miaotui.model.gguf_tokenizer import backend_from_gguf
from miaotui.model.names import GGUF_INTERLEAVED, HF
from miaotui.model.weights import halves
from miaotui.quant.pack import KINDS, blocks, compressed_words, grouped
from miaotui.quant.rounding import bfloat16_bits, round_to_nearest
from miaotui.quant.tensor import BlockTensor, DenseTensor, Tensor

Q4, Q8 = "Q4_0", "Q8_0"
FILE_TYPE_Q4_0 = 2


# -- GGUF ----------------------------------------------------------------------------------------------------
def demo_gguf(folder: Path) -> Path:
    """The demo in Q4_0, made when it is not there."""
    path = folder / "SmolLM2-135M-Instruct.Q4_0.gguf"
    if path.exists():
        return path
    source = open_checkpoint(resolve("demo"))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [Blocked(name, _kind(source.tensor(name)), source.tensor(name).shape) for name in source.names()]
    metadata = {**source.config, "general.file_type": FILE_TYPE_Q4_0}
    write_gguf(path, metadata, tensors, lambda name: _as_q4(source.tensor(name)))
    return path


def _kind(tensor: Tensor) -> str:
    """What a tensor of the demo becomes: only its Q4_1 matrices change."""
    if isinstance(tensor, BlockTensor):
        return Q4 if tensor.kind == "Q4_1" else tensor.kind
    return "F32"


def _as_q4(tensor: Tensor) -> DenseTensor | BlockTensor:
    if isinstance(tensor, BlockTensor) and tensor.kind == "Q4_1":
        return blocks(Q4, round_to_nearest(tensor.dense32(), KINDS[Q4].scheme))
    assert isinstance(tensor, DenseTensor | BlockTensor)
    return tensor


# -- Hugging Face folders ------------------------------------------------------------------------------------
def demo_bf16(folder: Path) -> Path:
    """`demo_gguf` as a folder that transformers and vLLM load, made when it is not there."""
    return _hf_folder(folder / "SmolLM2-135M-Instruct-bf16", demo_gguf(folder), int4=False)


def demo_int4(folder: Path) -> Path:
    """`demo_gguf` as a compressed-tensors folder (pack-quantized, groups of 32), made when it is not there."""
    return _hf_folder(folder / "SmolLM2-135M-Instruct-w4g32", demo_gguf(folder), int4=True)


def _hf_folder(path: Path, gguf: Path, *, int4: bool) -> Path:
    if path.exists():
        return path
    source = open_checkpoint(gguf)
    config = _hf_config(source)
    if int4:
        config["quantization_config"] = QUANTIZATION
    stored: list[Stored] = []
    loaders: dict[str, Callable[[], NDArray[Any]]] = {}
    for ours, theirs, heads in _pairs(source, config):
        packed = int4 and isinstance(source.tensor(ours), BlockTensor) and ours.startswith("blk.")
        make = _packed if packed else _dense
        for entry, load in make(source, ours, theirs, heads):
            stored.append(entry)
            loaders[entry.name] = load
    with atomic_folder(path) as building:
        write_json(building / "config.json", config)
        backend_from_gguf(source.config).save(str(building / "tokenizer.json"))
        write_safetensors(building / "model.safetensors", stored, lambda name: loaders[name]())
    return path


def _hf_config(source: Checkpoint) -> dict[str, Any]:
    """config.json of a Llama from its GGUF's metadata."""
    value = {key.removeprefix("llama."): entry for key, entry in source.config.items()}
    heads = int(value["attention.head_count"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": int(value["embedding_length"]),
        "intermediate_size": int(value["feed_forward_length"]),
        "num_hidden_layers": int(value["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(value["attention.head_count_kv"]),
        "head_dim": int(value["embedding_length"]) // heads,
        "max_position_embeddings": int(value["context_length"]),
        "rms_norm_eps": float(value["attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(value["rope.freq_base"]),
        "vocab_size": source.tensor("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in source.names(),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(source.config["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(source.config["tokenizer.ggml.eos_token_id"]),
    }


QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "observer": "minmax",
            },
        }
    },
}


def _pairs(source: Checkpoint, config: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(our tensor, theirs, heads whose rows llama.cpp's converter interleaved or 0), in the model's order."""
    found = [("token_embd", "model.embed_tokens", 0), ("output_norm", "model.norm", 0)]
    interleaved = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for role in HF.roles:
            ours, theirs = GGUF_INTERLEAVED.stems(role, layer), HF.stems(role, layer)
            for our, their in zip(ours, theirs, strict=False):
                found.append((our, their, interleaved.get(our.rpartition(".")[2], 0)))
    present = set(source.names())
    return [(f"{our}.weight", f"{their}.weight", heads) for our, their, heads in found if f"{our}.weight" in present]


Entry = tuple[Stored, Callable[[], NDArray[Any]]]


def _rows(source: Checkpoint, name: str, heads: int) -> Tensor:
    tensor = source.tensor(name)
    return tensor.rows(halves(heads, tensor.shape[0] // heads)) if heads else tensor


def _dense(source: Checkpoint, ours: str, theirs: str, heads: int) -> list[Entry]:
    stored = Stored(theirs, "BF16", source.tensor(ours).shape)
    return [(stored, lambda: bfloat16_bits(_rows(source, ours, heads).dense32()))]


def _packed(source: Checkpoint, ours: str, theirs: str, heads: int) -> list[Entry]:
    """The codes and scales of a Q4_0 matrix in compressed-tensors' words."""
    height, width = source.tensor(ours).shape
    stem = theirs.removesuffix("weight")

    def codes() -> NDArray[Any]:
        tensor = _rows(source, ours, heads)
        assert isinstance(tensor, BlockTensor)
        return compressed_words(grouped(tensor))[0]

    def scales() -> NDArray[Any]:
        tensor = _rows(source, ours, heads)
        assert isinstance(tensor, BlockTensor)
        return grouped(tensor).scale.astype(np.float16)

    return [
        (Stored(stem + "weight_packed", "I32", (height, width // 8)), codes),
        (Stored(stem + "weight_scale", "F16", (height, width // 32)), scales),
        (Stored(stem + "weight_shape", "I64", (2,)), lambda: np.array([height, width], np.int64)),
    ]


# -- larger shapes, random weights ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions, after its published configuration."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_base: float
    tied: bool
    qkv_bias: bool


SHAPES = {
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 5e5, True, False),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 1e6, False, True),
}
CONTEXT = 4096
"""Positions that the written file claims: enough for every regime, and little memory."""


def random_gguf(folder: Path, name: str) -> Path:
    """A GGUF of that shape with random Q4_0 matrices and Q8_0 tables, made when it is not there.

    Matrices are made one at a time, already coded. The tokenizer is the demo's, filled up with unused tokens.
    """
    shape = SHAPES[name]
    path = folder / f"{name}-random.Q4_0.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(shape)
    order = {tensor.name: number for number, tensor in enumerate(tensors)}
    kinds = {tensor.name: tensor for tensor in tensors}
    write_gguf(
        path,
        _metadata(name, shape),
        tensors,
        lambda wanted: _random(kinds[wanted], np.random.default_rng(order[wanted])),
    )
    return path


def _metadata(name: str, shape: Shape) -> dict[str, Any]:
    demo = open_checkpoint(resolve("demo")).config
    tokenizer = {key: value for key, value in demo.items() if key.startswith("tokenizer.ggml.")}
    tokens = list(tokenizer["tokenizer.ggml.tokens"])
    kinds = np.asarray(tokenizer["tokenizer.ggml.token_type"], np.int32)
    more = shape.vocabulary - len(tokens)
    tokenizer["tokenizer.ggml.tokens"] = tokens + [f"<|unused_{index}|>" for index in range(more)]
    tokenizer["tokenizer.ggml.token_type"] = np.concatenate([kinds, np.full(more, 5, np.int32)])
    arch = shape.architecture
    return {
        "general.architecture": arch,
        "general.name": f"{name} with random weights",
        "general.file_type": FILE_TYPE_Q4_0,
        f"{arch}.block_count": shape.layers,
        f"{arch}.context_length": CONTEXT,
        f"{arch}.embedding_length": shape.hidden,
        f"{arch}.feed_forward_length": shape.ffn,
        f"{arch}.attention.head_count": shape.heads,
        f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": shape.rope_base,
        f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.vocab_size": shape.vocabulary,
        **tokenizer,
    }


def _tensors(shape: Shape) -> list[Blocked]:
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found = [
        Blocked("token_embd.weight", Q8, (shape.vocabulary, hidden)),
        Blocked("output_norm.weight", "F32", (hidden,)),
    ]
    if not shape.tied:
        found.append(Blocked("output.weight", Q8, (shape.vocabulary, hidden)))
    matrices = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_output": (hidden, queries), "ffn_gate": (shape.ffn, hidden), "ffn_up": (shape.ffn, hidden),
        "ffn_down": (hidden, shape.ffn),
    }  # fmt: skip
    for layer in range(shape.layers):
        stem = f"blk.{layer}."
        found += [Blocked(f"{stem}{norm}.weight", "F32", (hidden,)) for norm in ("attn_norm", "ffn_norm")]
        found += [Blocked(f"{stem}{name}.weight", Q4, extent) for name, extent in matrices.items()]
        if shape.qkv_bias:
            found += [
                Blocked(f"{stem}{name}.bias", "F32", matrices[name][:1]) for name in ("attn_q", "attn_k", "attn_v")
            ]
    return found


def _random(tensor: Blocked, random: np.random.Generator) -> DenseTensor | BlockTensor:
    """Random codes under one scale, so that a matrix's outputs are about as large as its inputs."""
    if tensor.kind == "F32":
        fill = np.zeros if tensor.name.endswith(".bias") else np.ones
        return DenseTensor("float32", fill(tensor.shape, np.float32))
    kind = KINDS[tensor.kind]
    height, width = tensor.shape
    spread = 4.6 if tensor.kind == Q4 else 74.0  # the standard deviation of uniform codes of 4 and 8 bits
    data = np.frombuffer(random.bytes(tensor.nbytes), np.uint8).reshape(height, -1, kind.block_bytes).copy()
    data[..., :2] = np.array([1 / (spread * width**0.5)], np.float16).view(np.uint8)
    return BlockTensor(tensor.kind, data.reshape(height, -1), tensor.shape)


def describe(path: Path) -> dict[str, Any]:
    """For the report: where the weights lie, and how many bytes they are."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    quantised = path.is_dir() and "quantization_config" in json.loads((path / "config.json").read_text())
    kind = "GGUF Q4_0" if path.is_file() else "compressed-tensors int4" if quantised else "bfloat16"
    return {"name": path.name, "weights": kind, "bytes": sum(file.stat().st_size for file in files)}
