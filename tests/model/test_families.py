"""What is understood of a configuration, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.model.families import FAMILIES, hf
from miaotui.model.families.spec import make_spec
from miaotui.model.families.table import COMMON_KEYS, HARMLESS_KEYS
from miaotui.model.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def spec(config: Mapping[str, Any], max_model_len: int | None = None) -> ModelSpec:
    return make_spec(hf.describe(config), max_model_len)


def test_smollm2_as_its_authors_wrote_it() -> None:
    config = {
        **LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_cache": True,
    }
    made = spec(config)
    attention = made.layers[1].attention
    assert (made.family, made.tied_head, made.norm_eps, made.eos_token_ids) == ("llama", True, 1e-5, (2,))
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (4, 2, 16, 0.25)
    assert attention.rope is not None
    assert attention.rope.inv_freq[1] == pytest.approx(100000 ** (-1 / 8))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"hidden_act": "laplace"}, "laplace"),
        ({"rope_scaling": {"rope_type": "telepathic"}}, "telepathic"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        spec({**LLAMA, **change})
    assert caught.value.hint


def test_an_unknown_architecture_lists_what_is_supported() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec({"architectures": ["RwkvForCausalLM"]})
    assert all(family.title in caught.value.hint for family in FAMILIES)


def test_an_unknown_key_that_is_off_is_accepted() -> None:
    assert spec({**LLAMA, "clip_qkv": None, "use_parallel_residual": False, "extra_layers": 0}).family == "llama"


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "64"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": -4},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"rms_norm_eps": float("nan")},
        {"vocab_size": True},
        {"rope_theta": "big"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": [1, 2]},
    ],
    ids=str,
)
def test_an_impossible_configuration_is_one_error(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        spec({**LLAMA, **change})


def test_families_are_found_by_model_type_where_no_architecture_is_named() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert spec(config).family == "llama"


def test_mistral_without_its_window_has_the_one_of_its_first_release() -> None:
    config = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert spec(config).layers[0].attention.window == 4096
    assert spec({**config, "sliding_window": None}).layers[0].attention.window is None


def test_gemma3_with_vision_is_read_as_its_text_model() -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "sliding_window": 32,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    described = hf.describe(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {"depth": 2},
         "mm_tokens_per_image": 256}
    )  # fmt: skip
    made = make_spec(described, None)
    windows = [layer.attention.window for layer in made.layers]
    ropes = [layer.attention.rope for layer in made.layers]
    assert windows == [32] * 5 + [None, 32]
    assert ropes[0] is ropes[6]
    assert ropes[0] is not None
    assert ropes[5] is not None
    assert ropes[0].inv_freq[1] == pytest.approx(10_000 ** (-1 / 128))
    assert ropes[5].inv_freq[0] == pytest.approx(1 / 8)
    assert made.tied_head
    assert described.names.embedding == "language_model.model.embed_tokens"


def test_granite_scales() -> None:
    config = {**LLAMA, "architectures": ["GraniteForCausalLM"], "embedding_multiplier": 12.0, "logits_scaling": 8.0,
              "residual_multiplier": 0.22, "attention_multiplier": 0.015625}  # fmt: skip
    made = spec(config)
    assert (made.embedding_scale, made.logits_scale, made.residual_scale) == (12.0, 0.125, 0.22)
    assert made.layers[0].attention.scale == 0.015625


def test_keys_are_sorted_into_one_set_each() -> None:
    assert not COMMON_KEYS & HARMLESS_KEYS
    for family in FAMILIES:
        assert not family.keys & HARMLESS_KEYS, family.name
        assert not set(family.neutral) & (family.keys | COMMON_KEYS | HARMLESS_KEYS), family.name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_are_those_of_transformers(family: Any) -> None:
    """A key that a file leaves out means here what it means there."""
    transformers = pytest.importorskip("transformers", reason="the defaults are transformers'")
    config = transformers.AutoConfig.for_model(family.name)
    described = hf.Described(family, family.hf_names, {}, 0.0)
    renamed = {"num_experts": "num_local_experts"}
    own = {"norm_topk_prob"} if family.name == "mixtral" else set()  # its code always normalises
    for key in (family.keys | set(family.defaults)) - own:
        theirs = getattr(config, renamed.get(key, key), None)
        if key in ("layer_types", "no_rope_layers", "mlp_only_layers"):
            continue  # transformers fills these in; the golden tests compare the result
        if key == "sliding_window" and getattr(config, "use_sliding_window", None) is False:
            continue  # nulled there where it is switched off
        assert (described.get(renamed.get(key, key)) or False) == (theirs or False), key
    for key in ("tie_word_embeddings", "rms_norm_eps", "hidden_act", "num_key_value_heads"):
        ours = described.get(key, {"rms_norm_eps": 1e-6, "hidden_act": "silu"}.get(key))
        if hasattr(config, key) and ours is not None:
            assert ours == getattr(config, key), key
