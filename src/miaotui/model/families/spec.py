"""A ModelSpec from settings in transformers' vocabulary, whatever file they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miaotui.backends.ops import Activation, Attention, Rope
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.model import rope
from miaotui.model.families.table import ACTIVATIONS, Family
from miaotui.model.names import Names
from miaotui.model.spec import ExpertsSpec, LayerSpec, ModelSpec

MAX_LAYERS, MAX_EXPERTS, MAX_HEAD_DIM, MAX_SIZE = 4096, 65536, 65536, 1 << 28
"""Beyond what any model has, and small enough that a damaged file cannot take the memory."""

_REPAIR = "Take the configuration from the model's original repository."


@dataclass(frozen=True)
class Described:
    """A checkpoint's configuration in transformers' vocabulary, all of it understood.

    Beside transformers' keys: `rotary_dim`; `qkv_bias`, `out_bias`, `mlp_bias` (only GGUF has these three).
    norm_offset is 0 where the file's norm weights have it added already.
    """

    family: Family
    names: Names
    settings: Mapping[str, Any]
    norm_offset: float

    def get(self, key: str, default: Any = None) -> Any:
        """The file's value (None if it says so), else the family's default, else `default`."""
        if key in self.settings:
            return self.settings[key]
        return self.family.defaults.get(key, default)

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            cause = f"The configuration's {key} is {value!r:.60}, not a whole number from {minimum} to {maximum}."
            raise CheckpointError(cause, _REPAIR)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f"The configuration's {key} is {value!r:.60}, not a number.", _REPAIR)
        return float(value)

    def optional(self, key: str) -> float | None:
        """A number that means "none" when it is absent, null or 0."""
        return self.number(key, 0.0) or None


def make_spec(d: Described, max_model_len: int | None) -> ModelSpec:
    """The spec, with rotary frequencies for sequences of `max_model_len` (None: the configuration's own limit)."""
    family = d.family
    hidden = d.integer("hidden_size")
    length, attentions = _attentions(d, max_model_len)
    experts = _experts(d, len(attentions))
    return ModelSpec(
        family=family.name,
        vocab_size=d.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=d.integer("intermediate_size"),
        max_position=length,
        layers=tuple(LayerSpec(a, e) for a, e in zip(attentions, experts, strict=True)),
        activation=_activation(d),
        norm_eps=d.number("norm_epsilon" if family.norm_kind == "layer" else "rms_norm_eps", 1e-6),
        norm_kind=family.norm_kind,
        norm_offset=d.norm_offset,
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        qk_norm=family.qk_norm,
        qkv_bias=_bias(d, "qkv_bias", 0),
        out_bias=_bias(d, "out_bias", 1),
        mlp_bias=_bias(d, "mlp_bias", 2),
        gated_mlp=family.gated_mlp,
        tied_head=bool(d.get("tie_word_embeddings", False)),
        embedding_scale=math.sqrt(hidden) if family.embedding_root else d.number("embedding_multiplier", 1.0),
        residual_scale=d.number("residual_multiplier", 1.0),
        logits_scale=1.0 / (d.number("logits_scaling", 1.0) or 1.0),
        logits_softcap=d.optional("final_logit_softcapping"),
        bos_token_id=_ids(d.get("bos_token_id"))[0] if _ids(d.get("bos_token_id")) else None,
        eos_token_ids=_ids(d.get("eos_token_id")),
    )


def _bias(d: Described, key: str, place: int) -> bool:
    """What the file itself shows comes first (GGUF), then the family's rule."""
    rule = d.family.biases[place]
    if isinstance(rule, str):
        return bool(d.get(key, d.get(rule, False)))
    return bool(d.settings.get(key, rule))


def _activation(d: Described) -> Activation:
    name = d.get("hidden_activation") or d.get("hidden_act") or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        hint = f"Supported are {', '.join(sorted(ACTIVATIONS))}."
        raise UnsupportedModelError(f"The activation {name!r:.60} is not supported.", hint)
    return ACTIVATIONS[name]


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids from a number, a list or null."""
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(v for v in values if isinstance(v, int) and v >= 0))


# -- attention -------------------------------------------------------------------------------------------
def _attentions(d: Described, max_model_len: int | None) -> tuple[int, list[Attention]]:
    """The longest sequence, and attention for each layer."""
    count = d.integer("num_hidden_layers", maximum=MAX_LAYERS)
    heads, hidden = d.integer("num_attention_heads"), d.integer("hidden_size")
    kv_heads = d.integer("num_key_value_heads", default=heads)
    head_dim = d.integer("head_dim", default=hidden // heads, maximum=MAX_HEAD_DIM)
    if heads % kv_heads or head_dim % 2:
        cause = f"{heads} heads of {head_dim} elements cannot share {kv_heads} key-value heads."
        raise CheckpointError(cause, _REPAIR)
    kinds = _layer_kinds(d, count)
    length, ropes = _ropes(d, head_dim, kinds, max_model_len)
    turned = _turned_layers(d, count)
    window = _window(d, kinds)
    scale, softcap = _scale(d, head_dim), d.optional("attn_logit_softcapping")
    return length, [
        Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            rope=ropes[kind] if turn else None,
            window=window if kind == "sliding_attention" else None,
            softcap=softcap,
        )
        for kind, turn in zip(kinds, turned, strict=True)
    ]


def _scale(d: Described, head_dim: int) -> float:
    if "attention_multiplier" in d.family.keys:
        return d.number("attention_multiplier", 1.0)
    scalar = d.number("query_pre_attn_scalar", head_dim)
    if scalar <= 0:
        raise CheckpointError(f"The configuration's query_pre_attn_scalar is {scalar}, not positive.", _REPAIR)
    return 1.0 / math.sqrt(scalar)


def _layer_kinds(d: Described, count: int) -> list[str]:
    """`full_attention` or `sliding_attention` for each layer, after the file's list or the family's rule."""
    listed = d.get("layer_types")
    if listed is None:
        return [("sliding" if slides else "full") + "_attention" for slides in _sliding(d, count)]
    if not isinstance(listed, list) or len(listed) < count:
        raise CheckpointError(f"The configuration's layer_types is not a list of {count}.", _REPAIR)
    for kind in listed[:count]:
        if kind not in ("full_attention", "sliding_attention"):
            hint = "Supported are full_attention and sliding_attention."
            raise UnsupportedModelError(f"The layer type {kind!r:.60} is not supported.", hint)
    return listed[:count]


def _sliding(d: Described, count: int) -> list[bool]:
    rule = d.family.window
    layers = range(count)
    if rule == "all":
        return [True] * count
    if rule == "late":
        first = d.integer("max_window_layers", minimum=0)
        return [i >= first for i in layers]
    if rule == "pattern":
        key = "sliding_window_pattern" if d.get("sliding_window_pattern") else "_sliding_window_pattern"
        period = d.integer(key, default=d.family.period)
        return [bool((i + 1) % period) for i in layers]
    if rule == "without_rope":
        return [not turned for turned in _turned_layers(d, count)]
    return [False] * count


def _window(d: Described, kinds: list[str]) -> int | None:
    """The width of the window, None where it is switched off."""
    if d.get("use_sliding_window") is False or "sliding_attention" not in kinds:
        return None
    window = d.get("sliding_window")
    return None if not window else d.integer("sliding_window")


def _turned_layers(d: Described, count: int) -> list[bool]:
    """Which layers have a rotary embedding (SmolLM3 leaves each fourth without)."""
    if "no_rope_layers" not in d.family.keys:
        return [True] * count
    listed = d.get("no_rope_layers")
    if listed is None:
        interval = d.integer("no_rope_layer_interval")
        return [bool((i + 1) % interval) for i in range(count)]
    if not isinstance(listed, list) or len(listed) < count:
        raise CheckpointError(f"The configuration's no_rope_layers is not a list of {count}.", _REPAIR)
    return [bool(turn) for turn in listed[:count]]


# -- rotary embedding ------------------------------------------------------------------------------------
def _ropes(d: Described, head_dim: int, kinds: list[str], max_model_len: int | None) -> tuple[int, dict[str, Rope]]:
    """The longest sequence, and one rotary embedding for each kind of layer; layers of a kind share the object."""
    limit = d.integer("max_position_embeddings", maximum=rope.MAX_POSITION)
    parameters = {kind: rope_parameters(d, kind) for kind in dict.fromkeys(kinds)}
    main = parameters.get("full_attention") or next(iter(parameters.values()))
    nested = d.family.sliding_rope_theta is not None
    length = min(max_model_len or limit, limit) if nested else rope.context(main, limit, max_model_len)
    made: dict[str, Rope] = {}
    for kind, values in parameters.items():
        same = next((made[other] for other in made if parameters[other] == values), None)
        rotary = _rotary_dim(d, head_dim, values)
        made[kind] = same or rope.make(values, rotary, max_position=limit, length=length)
    return length, made


def _rotary_dim(d: Described, head_dim: int, values: Mapping[str, Any]) -> int:
    """How many elements of a head are turned, in pairs."""
    part = values.get("partial_rotary_factor")
    if d.get("rotary_dim") is None and isinstance(part, (int, float)) and 0 < part <= 1:
        rotary = int(head_dim * part)
    else:
        rotary = d.integer("rotary_dim", default=head_dim)
    if not 0 < rotary <= head_dim or rotary % 2:
        raise CheckpointError(f"{rotary} of {head_dim} elements of a head cannot be turned.", _REPAIR)
    return rotary


def rope_parameters(d: Described, kind: str) -> dict[str, Any]:
    """`rope_parameters` of one kind of layer, from the present form or the older rope_theta and rope_scaling."""
    given = d.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or not isinstance(d.get("rope_scaling") or {}, Mapping):
        raise CheckpointError("The configuration's rope parameters are not an object.", _REPAIR)
    nested = given.get(kind)
    local = kind == "sliding_attention" and d.family.sliding_rope_theta is not None
    theta = d.number("rope_local_base_freq", d.family.sliding_rope_theta or 0.0) if local else None
    if isinstance(nested, Mapping):
        values = dict(nested)
    elif "full_attention" in given or "sliding_attention" in given or local:
        values = {}
    else:
        values = {**given, **(d.get("rope_scaling") or {})}
    values.setdefault("rope_theta", theta or d.number("rope_theta", d.family.rope_theta))
    if d.get("partial_rotary_factor") is not None:
        values.setdefault("partial_rotary_factor", d.get("partial_rotary_factor"))
    if d.get("original_max_position_embeddings") is not None:
        values["original_max_position_embeddings"] = d.get("original_max_position_embeddings")
    if d.family.name == "phi3" and rope.rope_type(values) == "yarn":
        values["rope_type"] = "longrope"  # the first Phi-3 files call it so
    if values.get("partial_rotary_factor", 1.0) != 1.0 and "partial_rotary_factor" not in d.family.keys:
        cause = f"partial_rotary_factor is not understood for {d.family.title}."
        raise UnsupportedModelError(cause, "Use a model of a family that has it, such as Phi-3.")
    return values


# -- experts ---------------------------------------------------------------------------------------------
def _experts(d: Described, count: int) -> list[ExpertsSpec | None]:
    """The routed MLP of each layer, None where it is dense."""
    if not d.family.routed:
        return [None] * count
    alias = "num_experts" if "num_experts" in d.settings else "num_local_experts"
    number, top_k = d.integer(alias, maximum=MAX_EXPERTS), d.integer("num_experts_per_tok")
    if top_k > number:
        raise CheckpointError(f"The configuration takes {top_k} of {number} experts.", _REPAIR)
    width = d.integer("moe_intermediate_size", default=d.integer("intermediate_size"))
    spec = ExpertsSpec(number, top_k, width, bool(d.get("norm_topk_prob")))
    step, dense = d.integer("decoder_sparse_step", default=1), d.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError("The configuration's mlp_only_layers is not a list.", _REPAIR)
    return [spec if (i + 1) % step == 0 and i not in dense else None for i in range(count)]
