"""GGUF metadata, read into transformers' vocabulary, after llama.cpp's converter and loader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from miaotui.checkpoint.base import Checkpoint
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.model.families.spec import Described
from miaotui.model.families.table import FAMILIES, Family, supported, words

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "rotary_dim",
}
"""Metadata keys (after the architecture's name) that are a setting by another name."""

READ = words(
    "vocab_size attention.value_length rope.freq_base_swa rope.scaling.type rope.scaling.factor rope.scale_linear",
    "rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow rope.scaling.finetuned",
)
"""Keys that are read in another way, below."""

NEUTRAL: Mapping[str, Any] = {"attention.causal": True, "tensor_data_layout": "Meta AI original pth"}

ROOT_OF_HIDDEN = {"gemma2": 46, "gemma3_text": 62}
"""The 27B models, told by their layers, scale scores by the mean head width; GGUF doesn't say it."""


def describe(checkpoint: Checkpoint) -> Described:
    """The family and settings of a GGUF file. Raises UnsupportedModelError for what is not understood."""
    metadata = checkpoint.config
    arch = str(metadata.get("general.architecture"))
    own = {name[len(arch) + 1 :]: _scalar(name, v) for name, v in metadata.items() if name.startswith(arch + ".")}
    family = _family(arch, own)
    settings = _settings(arch, own)
    names = frozenset(checkpoint.names())
    settings["vocab_size"] = checkpoint.tensor("token_embd.weight").shape[0]
    settings["tie_word_embeddings"] = "output.weight" not in names
    for key, stem in (("qkv_bias", "attn_q"), ("out_bias", "attn_output"), ("mlp_bias", "ffn_down")):
        settings[key] = f"blk.0.{stem}.bias" in names or (key == "qkv_bias" and "blk.0.attn_qkv.bias" in names)
    settings["rope_parameters"] = _rope(own, checkpoint, family, names)
    settings.pop("rope_theta", None)
    _fill_gaps(settings, family)
    return Described(family, family.gguf_names, settings, norm_offset=0.0)


def _family(arch: str, own: Mapping[str, Any]) -> Family:
    mixture = arch == "llama" and own.get("expert_count")
    for family in FAMILIES:
        if family.name == "mixtral" if mixture else family.gguf == arch:
            return family
    raise UnsupportedModelError(f"The GGUF architecture {arch!r:.100} is not supported.", supported())


def _settings(arch: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of this architecture, translated; one that is set and unknown is refused."""
    settings: dict[str, Any] = {}
    for key, value in own.items():
        if key in KEYS:
            settings[KEYS[key]] = value
        elif key not in READ and value and NEUTRAL.get(key) != value:
            cause = f"The GGUF key {arch + '.' + key!r:.100} ({value!r:.60}) is not understood."
            raise UnsupportedModelError(cause, "Convert the model again from its repository; " + supported())
    if own.get("attention.value_length") not in (None, settings.get("head_dim")):
        raise UnsupportedModelError("Values of another width than keys are not supported.", supported())
    return settings


def _scalar(name: str, value: Any) -> Any:
    """One number where a file repeats it for each layer."""
    if not isinstance(value, np.ndarray):
        return value
    if value.size == 0 or (value != value[0]).any():
        raise UnsupportedModelError(f"The GGUF key {name!r:.100} differs between layers.", supported())
    return value[0].item()


def _rope(own: Mapping[str, Any], checkpoint: Checkpoint, family: Family, names: frozenset[str]) -> dict[str, Any]:
    """transformers' rope_parameters; nested by kind of layer where the two kinds differ."""
    values: dict[str, Any] = {"rope_theta": _number(own, "rope.freq_base") or 10_000.0}
    original = _number(own, "rope.scaling.original_context_length")
    if original:
        values["original_max_position_embeddings"] = int(original)
    if "rope_freqs.weight" in names:
        values |= {"rope_type": "divided", "divisors": checkpoint.tensor("rope_freqs.weight").dense32().tolist()}
    elif "rope_factors_long.weight" in names:
        long, short = (
            checkpoint.tensor(f"rope_factors_{kind}.weight").dense32().tolist() for kind in ("long", "short")
        )
        values |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        values["attention_factor"] = _number(own, "rope.scaling.attn_factor")
    else:
        values |= _scaling(own)
    if family.sliding_rope_theta is None:
        return values
    local = _number(own, "rope.freq_base_swa") or family.sliding_rope_theta
    return {"full_attention": values, "sliding_attention": {"rope_theta": local}}


def _scaling(own: Mapping[str, Any]) -> dict[str, Any]:
    kind, factor = own.get("rope.scaling.type"), _number(own, "rope.scaling.factor")
    linear = _number(own, "rope.scale_linear")
    if linear:
        kind, factor = "linear", linear
    if kind in (None, "none") or (kind == "linear" and not factor):
        return {}
    values = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        values["beta_fast"] = _number(own, "rope.scaling.yarn_beta_fast")
        values["beta_slow"] = _number(own, "rope.scaling.yarn_beta_slow")
        weight = _number(own, "rope.scaling.attn_factor")
        if weight and factor and factor > 0:
            values["attention_factor"] = weight * (1 + 0.1 * math.log(factor))
    return values


def _number(own: Mapping[str, Any], key: str) -> float | None:
    value = own.get(key)
    if value is None or (isinstance(value, (int, float)) and math.isfinite(value)):
        return value
    raise CheckpointError(f"The GGUF key {key!r} is {value!r:.60}, not a number.", "Download the file again.")


def _fill_gaps(settings: dict[str, Any], family: Family) -> None:
    """What llama.cpp knows of an architecture without being told by the file."""
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if not (type(hidden) is int and type(heads) is int and 1 <= heads <= hidden):
        raise CheckpointError("The GGUF metadata lacks the model's width or its heads.", "Download the file again.")
    head_dim = settings.setdefault("head_dim", hidden // heads)
    if family.name in ROOT_OF_HIDDEN:
        wide = settings.get("num_hidden_layers") == ROOT_OF_HIDDEN[family.name]
        settings["query_pre_attn_scalar"] = hidden // heads if wide else head_dim
    if family.name == "granite" and type(head_dim) is int and head_dim > 0:
        settings.setdefault("attention_multiplier", head_dim**-0.5)
    if family.gguf in ("qwen2", "qwen3", "qwen3moe", "starcoder2") or family.name == "mixtral":
        settings.setdefault("sliding_window", None)  # its converter writes no window, and llama.cpp uses none
    if family.name == "qwen3_moe":
        settings["norm_topk_prob"] = True
    if family.gguf_names.interleaved and settings.get("rotary_dim", head_dim) != head_dim:
        raise UnsupportedModelError("Partly turned heads in a permuted GGUF file are not supported.", supported())
