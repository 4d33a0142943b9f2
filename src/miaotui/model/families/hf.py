"""config.json, in the forms that transformers 4 and 5 write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miaotui.errors import UnsupportedModelError
from miaotui.model.families.spec import Described
from miaotui.model.families.table import COMMON_KEYS, FAMILIES, HARMLESS_KEYS, Family, supported
from miaotui.model.names import Names


def describe(config: Mapping[str, Any]) -> Described:
    """The family and settings that a config.json holds. Raises UnsupportedModelError for what is not understood."""
    family = find_family(config)
    settings, names = dict(config), family.hf_names
    if isinstance(config.get("text_config"), Mapping) and family.name == "gemma3_text":
        settings, names = _text_part(config, names)
    _check_keys(family, settings)
    return Described(family, names, settings, family.norm_offset)


def find_family(config: Mapping[str, Any]) -> Family:
    """By `architectures`, or by `model_type` in a file without them."""
    architectures = config.get("architectures")
    model_type = config.get("model_type")
    named = architectures if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if named[0] in family.architectures if named else model_type == family.name:
            return family
    found = named[0] if named else model_type
    raise UnsupportedModelError(f"The architecture {found!r:.100} is not supported.", supported())


def _check_keys(family: Family, settings: Mapping[str, Any]) -> None:
    """Refuse a key that may change the mathematics and that nobody reads. A key that is off changes nothing."""
    understood = COMMON_KEYS | family.keys | HARMLESS_KEYS
    for key, value in settings.items():
        off = value is None or value is False or value in (0, 0.0, "", [], {})
        if key in understood or off or (key in family.neutral and value == family.neutral[key]):
            continue
        if family.name.startswith("gemma") and key == "hidden_act":  # overridden by hidden_activation
            continue
        raise UnsupportedModelError(
            f"The configuration sets {key!r:.100} to {value!r:.60}, which is not understood for {family.title}.",
            "If it does not change the model's output, remove it from config.json; " + supported(),
        )


def _text_part(config: Mapping[str, Any], names: Names) -> tuple[dict[str, Any], Names]:
    """Gemma 3 with vision: its text model alone. Images are not served, so those weights are left in the file."""
    settings = dict(config["text_config"])
    for key in ("tie_word_embeddings", "quantization_config", "eos_token_id", "bos_token_id"):
        if key in config:
            settings.setdefault(key, config[key])
    prefixed = replace(
        names,
        embedding="language_model.model.embed_tokens",
        norm="language_model.model.norm",
        head="language_model.lm_head",
        layers="language_model.model.layers.{}.",
        ignorable=(*names.ignorable, "vision_tower.", "multi_modal_projector."),
    )
    return settings, prefixed
