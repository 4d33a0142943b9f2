"""Tiny random models of every family, with odd sizes, made by transformers (imported only when one is made)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LAYERS, VOCAB = 3, 211


@dataclass(frozen=True, eq=False)
class Case:
    """One tiny model: a transformers class prefix, its settings, and how long a sequence to compare.

    length is also the `max_model_len` it is loaded with. gguf: whether llama.cpp writes such a model.
    """

    name: str
    family: str
    prefix: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    length: int = 45
    gguf: bool = True


BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.05 * i for i in range(9)],
    "long_factor": [1.5 + 0.7 * i for i in range(9)],
}
MOE = {"num_experts_per_tok": 2, "head_dim": 20}

CASES = (
    Case("llama", "llama", "Llama", {"head_dim": 20}),
    Case("llama-tied", "llama", "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    Case("llama-bias", "llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama3-rope", "llama", "Llama", {"rope_parameters": LLAMA3}, length=64),
    Case("llama-linear", "llama", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}, length=150),
    Case("llama-dynamic", "llama", "Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}},
         length=150, gguf=False),
    Case("llama-yarn", "llama", "Llama", {"rope_parameters": YARN}, length=150),
    Case("mistral", "mistral", "Mistral", {"sliding_window": 7, "head_dim": 20}, gguf=False),
    Case("mistral-full", "mistral", "Mistral", {"sliding_window": None, "head_dim": 20}),
    Case("mixtral", "mixtral", "Mixtral", {**MOE, "num_local_experts": 5}),
    Case("mixtral-split", "mixtral", "Mixtral", {**MOE, "num_local_experts": 3, "tie_word_embeddings": True}),
    Case("qwen2", "qwen2", "Qwen2"),
    Case("qwen2-window", "qwen2", "Qwen2",
         {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
         gguf=False),
    Case("qwen2-yarn", "qwen2", "Qwen2", {"rope_parameters": YARN}, length=150),
    Case("qwen3", "qwen3", "Qwen3", {"head_dim": 20}),
    Case("qwen3-tied-bias", "qwen3", "Qwen3", {"head_dim": 20, "tie_word_embeddings": True, "attention_bias": True}),
    Case("qwen3-moe", "qwen3_moe", "Qwen3Moe",
         {**MOE, "num_experts": 7, "moe_intermediate_size": 28, "norm_topk_prob": True}),
    Case("qwen3-moe-mixed", "qwen3_moe", "Qwen3Moe",
         {**MOE, "num_experts": 4, "moe_intermediate_size": 28, "mlp_only_layers": [1], "use_sliding_window": True,
          "sliding_window": 11}, gguf=False),
    Case("gemma2", "gemma2", "Gemma2", {"head_dim": 20, "query_pre_attn_scalar": 20, "sliding_window": 7}),
    Case("gemma2-scale", "gemma2", "Gemma2",
         {"head_dim": 20, "query_pre_attn_scalar": 13, "sliding_window": 64}, gguf=False),
    Case("gemma3", "gemma3_text", "Gemma3", {
        "num_hidden_layers": 7, "head_dim": 20, "query_pre_attn_scalar": 20, "sliding_window": 7,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    }, length=60),
    Case("phi3", "phi3", "Phi3", {"sliding_window": 8}),
    Case("phi3-partial-short", "phi3", "Phi3",
         {"hidden_size": 144, "original_max_position_embeddings": 64, "max_position_embeddings": 256,
          "rope_parameters": {**LONG, "partial_rotary_factor": 0.75}}, length=64),
    Case("phi3-partial-long", "phi3", "Phi3",
         {"hidden_size": 144, "original_max_position_embeddings": 64, "max_position_embeddings": 256,
          "rope_parameters": {**LONG, "partial_rotary_factor": 0.75}}, length=130),
    Case("smollm3", "smollm3", "SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    Case("smollm3-window", "smollm3", "SmolLM3",
         {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 9}, gguf=False),
    Case("granite", "granite", "Granite",
         {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
          "attention_multiplier": 0.13, "tie_word_embeddings": True}),
    Case("olmo2", "olmo2", "Olmo2"),
    Case("starcoder2", "starcoder2", "Starcoder2", {"use_bias": True}),
    Case("starcoder2-window", "starcoder2", "Starcoder2",
         {"use_bias": False, "sliding_window": 9, "tie_word_embeddings": False}, gguf=False),
)  # fmt: skip


def make(case: Case) -> Any:
    """The model, in float32, with weights large enough to tell right from wrong."""
    import torch
    import transformers

    torch.manual_seed(0)
    config_name = "Gemma3TextConfig" if case.prefix == "Gemma3" else f"{case.prefix}Config"
    settings = {**BASE, "attn_implementation": "eager", **case.settings}
    model = getattr(transformers, f"{case.prefix}ForCausalLM")(getattr(transformers, config_name)(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.2))
    return model.float().eval()


def tokens(case: Case, seed: int = 1) -> torch.Tensor:
    import torch

    return torch.randint(3, VOCAB, (case.length,), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """transformers' own, for one whole sequence: `[tokens, vocabulary]`."""
    import torch

    with torch.no_grad():
        return model(ids[None]).logits[0]
