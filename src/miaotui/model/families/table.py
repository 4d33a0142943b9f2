"""The families, as data: long because it is one table. Defaults are transformers' (a test compares them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from miaotui.backends.ops import Activation
from miaotui.model import names
from miaotui.model.names import Names

WindowRule = Literal["none", "all", "late", "pattern", "without_rope"]
"""Which layers see only the last `sliding_window` positions, where the file doesn't list its `layer_types`:
none; all; those from `max_window_layers` on; all but each `period`-th; those without rope."""

Bias = bool | str
"""Always, never, or where this key of the configuration is true."""


def words(*lines: str) -> frozenset[str]:
    """The words of these lines."""
    return frozenset(word for line in lines for word in line.split())


@dataclass(frozen=True)
class Family:
    """What transformers' modelling code of one architecture does, in switches.

    keys: configuration keys understood beside COMMON_KEYS; each is read somewhere in `spec.py` or `hf.py`.
    neutral: keys that change nothing at this one value, and are refused at others.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    keys: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    hf_names: Names = names.HF
    gguf: str | None = None
    """`general.architecture` of its GGUF files; None where another family's stands for it."""
    gguf_names: Names = names.GGUF
    window: WindowRule = "none"
    period: int = 0
    biases: tuple[Bias, Bias, Bias] = (False, False, False)
    """Of q/k/v, of attention's output, of the MLP."""
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: bool = False
    gated_mlp: bool = True
    embedding_root: bool = False
    """Embeddings are multiplied by √hidden_size."""
    rope_theta: float = 10_000.0
    sliding_rope_theta: float | None = None
    """Layers with a window turn with this base, unscaled, where the file doesn't say otherwise."""
    routed: bool = False


ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}

COMMON_KEYS = words(
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads",
    "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta",
    "rope_scaling rope_parameters original_max_position_embeddings bos_token_id eos_token_id",
    "quantization_config",
)
"""Understood for every family."""

HARMLESS_KEYS = words(
    "_attn_implementation _attn_implementation_autoset _from_model_config _name_or_path activation_dropout",
    "attention_dropout attention_probs_dropout_prob attn_implementation auto_map begin_suppress_tokens",
    "cache_implementation chunk_size_feed_forward decoder_start_token_id do_sample dtype embd_pdrop",
    "embedding_dropout finetuning_task forced_bos_token_id forced_eos_token_id generation_config hidden_dropout",
    "hidden_dropout_prob id2label initializer_range is_llama_config keys_to_ignore_at_inference label2id",
    "length_penalty max_length max_new_tokens min_length model_max_length num_beams num_labels output_attentions",
    "output_hidden_states output_router_logits pad_token_id prefix pretraining_tp problem_type repetition_penalty",
    "resid_pdrop residual_dropout return_dict router_aux_loss_coef router_jitter_noise sep_token_id",
    "task_specific_params temperature tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config",
    "transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_cache",
)
"""Keys that say nothing about a forward pass at inference."""

_MIXTURE = words("num_local_experts num_experts num_experts_per_tok")
_SWITCHED = words("use_sliding_window sliding_window max_window_layers layer_types")
_GEMMA = words(
    "hidden_activation query_pre_attn_scalar sliding_window layer_types final_logit_softcapping attention_bias"
)
_GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "Llama 1–3, SmolLM2",
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        words("attention_bias mlp_bias"),
        biases=("attention_bias", "attention_bias", "mlp_bias"),
        gguf="llama",
        gguf_names=names.GGUF_INTERLEAVED,
        neutral={"rope_interleaved": False},
    ),
    Family(
        "mistral",
        "Mistral",
        ("MistralForCausalLM",),
        words("sliding_window"),
        defaults={"sliding_window": 4096},
        window="all",
    ),
    Family(
        "mixtral",
        "Mixtral",
        ("MixtralForCausalLM",),
        words("sliding_window") | _MIXTURE,
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-5},
        hf_names=names.HF_MIXTRAL,
        window="all",
        routed=True,
        rope_theta=1e6,
        gguf_names=names.GGUF_INTERLEAVED,
    ),
    Family(
        "qwen2",
        "Qwen2, Qwen2.5",
        ("Qwen2ForCausalLM",),
        _SWITCHED,
        defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        neutral={"use_mrope": False},
        biases=(True, False, False),
        gguf="qwen2",
        window="late",
    ),
    Family(
        "qwen3",
        "Qwen3",
        ("Qwen3ForCausalLM",),
        words("attention_bias") | _SWITCHED,
        defaults={"head_dim": 128, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        biases=("attention_bias", "attention_bias", False),
        qk_norm=True,
        gguf="qwen3",
        window="late",
    ),
    Family(
        "qwen3_moe",
        "Qwen3-MoE",
        ("Qwen3MoeForCausalLM",),
        words(
            "attention_bias moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers",
            "use_sliding_window sliding_window max_window_layers",
        )
        | _MIXTURE,
        defaults={
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        biases=("attention_bias", "attention_bias", False),
        qk_norm=True,
        gguf="qwen3moe",
        window="all",
        routed=True,
    ),
    Family(
        "gemma2",
        "Gemma 2",
        ("Gemma2ForCausalLM",),
        words("attn_logit_softcapping") | _GEMMA,
        defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        neutral={"sliding_window_size": 4096},
        biases=("attention_bias", "attention_bias", False),
        hf_names=names.HF_GEMMA,
        gguf="gemma2",
        window="pattern",
        period=2,
        norm_offset=1.0,
        post_norm=True,
        embedding_root=True,
    ),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        words("sliding_window_pattern _sliding_window_pattern rope_local_base_freq") | _GEMMA,
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "_sliding_window_pattern": 6,
        },
        biases=("attention_bias", "attention_bias", False),
        hf_names=names.HF_GEMMA,
        gguf="gemma3",
        window="pattern",
        period=6,
        norm_offset=1.0,
        post_norm=True,
        qk_norm=True,
        embedding_root=True,
        rope_theta=1e6,
        sliding_rope_theta=10_000.0,
    ),
    Family(
        "phi3",
        "Phi-3, Phi-3.5, Phi-4",
        ("Phi3ForCausalLM",),
        words("sliding_window partial_rotary_factor"),
        defaults={"rms_norm_eps": 1e-5},
        neutral={"full_attn_mod": 1, "interpolate_factor": 1},
        hf_names=names.HF_PHI3,
        gguf="phi3",
        gguf_names=names.GGUF_PHI3,
        window="all",
    ),
    Family(
        "smollm3",
        "SmolLM3",
        ("SmolLM3ForCausalLM",),
        words(
            "attention_bias mlp_bias no_rope_layers no_rope_layer_interval use_sliding_window sliding_window",
            "layer_types max_window_layers",
        ),
        defaults={"no_rope_layer_interval": 4, "tie_word_embeddings": True},
        biases=("attention_bias", "attention_bias", "mlp_bias"),
        gguf="smollm3",
        gguf_names=names.GGUF_INTERLEAVED,
        window="without_rope",
        rope_theta=2e6,
    ),
    Family(
        "granite",
        "Granite 3",
        ("GraniteForCausalLM",),
        words(
            "attention_bias mlp_bias embedding_multiplier logits_scaling residual_multiplier attention_multiplier",
        ),
        defaults={
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        biases=("attention_bias", "attention_bias", "mlp_bias"),
        gguf="granite",
        gguf_names=names.GGUF_INTERLEAVED,
    ),
    Family(
        "olmo2",
        "OLMo 2",
        ("Olmo2ForCausalLM",),
        words("attention_bias"),
        defaults={"rms_norm_eps": 1e-5},
        biases=("attention_bias", "attention_bias", False),
        hf_names=names.HF_OLMO2,
        gguf="olmo2",
        pre_norm=False,
        post_norm=True,
        qk_norm=True,
    ),
    Family(
        "starcoder2",
        "StarCoder2",
        ("Starcoder2ForCausalLM",),
        words("norm_epsilon use_bias sliding_window"),
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
        },
        neutral={
            "mlp_type": "default",
            "norm_type": "layer_norm",
            "activation_function": "gelu_pytorch_tanh",
            "scale_attn_weights": True,
            "scale_attention_softmax_in_fp32": True,
            "attention_softmax_in_fp32": True,
            "layer_norm_epsilon": 1e-5,
        },
        biases=("use_bias", "use_bias", "use_bias"),
        hf_names=names.HF_STARCODER2,
        gguf="starcoder2",
        gguf_names=names.GGUF_STARCODER2,
        window="all",
        norm_kind="layer",
        gated_mlp=False,
    ),
)


def supported() -> str:
    """The families in one line, for hints."""
    return "Supported families are " + "; ".join(family.title for family in FAMILIES) + "."
