"""A transformers model as llama.cpp's converter writes it to GGUF (convert_hf_to_gguf.py), in float32.

Tensor and key names come from the `gguf` package, so that they are an independent check of ours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from miaotui.model.rope import make as make_rope
from tests.golden.models import Case

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "smollm3": "SMOLLM3",
    "granite": "GRANITE",
    "olmo2": "OLMO2",
    "starcoder2": "STARCODER2",
}
PERMUTED = {"llama", "mistral", "mixtral", "smollm3", "granite"}


def write(model: Any, case: Case, path: Path) -> None:
    config = model.config
    arch = gguf.MODEL_ARCH[ARCHITECTURES[case.family]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _metadata(writer, config, case)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in _tensors(model, case).items():
        stem, _, suffix = name.rpartition(".")
        mapped = names.get_name(stem)
        assert mapped is not None, name
        stored = {f"{mapped}.{suffix}": tensor}
        if case.name.endswith("-split") and mapped.endswith("_exps"):  # as converters did until March 2024
            stored = {f"{mapped.removesuffix('_exps')}.{e}.{suffix}": expert for e, expert in enumerate(tensor)}
        for key, value in stored.items():
            writer.add_tensor(key, np.ascontiguousarray(value.numpy()))
    _rope_tensors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: gguf.GGUFWriter, config: Any, case: Case) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if case.family == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _family_keys(writer, config, case)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _family_keys(writer: gguf.GGUFWriter, config: Any, case: Case) -> None:
    if case.family in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if case.family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if case.family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if case.family in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if case.family == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if case.family == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = config.max_position_embeddings / original
        if config.rope_parameters["rope_type"] == "longrope":
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))


def _rope_tensors(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        dim = config.hidden_size // config.num_attention_heads
        plain = make_rope({"rope_theta": rope["rope_theta"]}, dim, max_position=1, length=1).inv_freq
        scaled, _ = transformers_frequencies(config)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))


def transformers_frequencies(config: Any, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)
    return frequencies.numpy(), factor


def _tensors(model: Any, case: Case) -> dict[str, torch.Tensor]:
    """The state dict with the converter's changes: Q and K interleaved, norms offset, no tied head."""
    config = model.config
    out: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if case.family in PERMUTED and ".q_proj." in name:
            tensor = _permute(tensor, config.num_attention_heads)
        if case.family in PERMUTED and ".k_proj." in name:
            tensor = _permute(tensor, config.num_key_value_heads)
        if case.family.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            out |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            out[f"{name}.weight"] = tensor
        else:
            out[name] = tensor
    return out


def _permute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
