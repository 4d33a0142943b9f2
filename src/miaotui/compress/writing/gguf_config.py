"""GGUF metadata of a model: a file's own, or made of a Hugging Face configuration as llama.cpp's converter does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from miaotui.backends.ops import Rope
from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.specs import CLOSE, difference
from miaotui.errors import UnsupportedModelError
from miaotui.model import rope
from miaotui.model.families import FAMILIES, Described, Family, describe, read_spec
from miaotui.model.families.spec import rope_parameters
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.quant.tensor import DenseTensor, Tensor

STANDS_FOR = {"mistral": "llama", "mixtral": "llama"}
"""Families without an architecture of their own in GGUF."""

WINDOWED = ("gemma2", "gemma3", "phi3")
"""Architectures whose files state the width of their windows; llama.cpp uses none for others."""

_STALE = ("split.", "quantize.", "general.file_type", "general.quantization_version", "general.alignment")
"""Keys of a GGUF file that tell of its own bytes."""


@dataclass(frozen=True, eq=False)
class GGUFTarget:
    """How the file is laid out: its tensors' names, its settings, and tensors that are settings (rope divisors)."""

    names: Names
    metadata: Mapping[str, Any]
    settings: Mapping[str, DenseTensor] = field(default_factory=dict)


def gguf_target(source: Checkpoint, spec: ModelSpec, names: Names) -> GGUFTarget:
    """Metadata but for the tokenizer's and what tells of types.

    Raises UnsupportedModelError for a family or rope that GGUF has no word for.
    """
    if source.format == "gguf":
        kept = copied_metadata(source)
        found = [name for name in source.names() if any(part in name for part in names.ignorable)]
        tensors = {name: DenseTensor("float32", source.tensor(name).dense32()) for name in found}
        return GGUFTarget(names, kept, tensors)
    described = describe(source)
    family = _gguf_family(described.family)
    arch = family.gguf
    assert arch is not None
    settings, tensors = _rope(described, spec)
    settings = _sizes(described, spec) | _switches(described, spec, arch) | settings
    general = {"general.architecture": arch, "general.type": "model", "general.name": source.path.resolve().name}
    own = {f"{arch}.{key}": value for key, value in settings.items()}
    return GGUFTarget(family.gguf_names, general | own, tensors)


def copied_metadata(source: Checkpoint) -> dict[str, Any]:
    """What a GGUF file says of more than its own bytes."""
    return {key: value for key, value in source.config.items() if not key.startswith(_STALE)}


def _gguf_family(family: Family) -> Family:
    arch = family.gguf or STANDS_FOR.get(family.name)
    found = next((other for other in FAMILIES if arch is not None and other.gguf == arch), None)
    if found is None:
        _unsaid(f"it has no architecture for {family.title}")
    return found


def _sizes(d: Described, spec: ModelSpec) -> dict[str, Any]:
    attention = spec.layers[0].attention
    norm = "attention.layer_norm_epsilon" if spec.norm_kind == "layer" else "attention.layer_norm_rms_epsilon"
    sizes: dict[str, Any] = {
        "block_count": len(spec.layers),
        "context_length": d.integer("max_position_embeddings"),
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "vocab_size": spec.vocab_size,
        norm: spec.norm_eps,
    }
    experts = next((layer.experts for layer in spec.layers if layer.experts is not None), None)
    if experts is not None:
        sizes |= {"expert_count": experts.count, "expert_used_count": experts.top_k}
        if "moe_intermediate_size" in d.family.keys:
            sizes["expert_feed_forward_length"] = experts.width
    return sizes


def _switches(d: Described, spec: ModelSpec, arch: str) -> dict[str, Any]:
    """Windows, soft caps and Granite's factors."""
    attention = spec.layers[0].attention
    switches: dict[str, Any] = {}
    if arch in WINDOWED:
        windows = [layer.attention.window for layer in spec.layers if layer.attention.window]
        switches["attention.sliding_window"] = windows[0] if windows else 0
    if attention.softcap is not None:
        switches["attn_logit_softcapping"] = attention.softcap
    if spec.logits_softcap is not None:
        switches["final_logit_softcapping"] = spec.logits_softcap
    if arch == "granite":
        switches |= {
            "attention.scale": attention.scale,
            "embedding_scale": spec.embedding_scale,
            "residual_scale": spec.residual_scale,
            "logit_scale": d.number("logits_scaling", 1.0),
        }
    return switches


# -- rotary embedding --------------------------------------------------------------------------------------------
def _rope(d: Described, spec: ModelSpec) -> tuple[dict[str, Any], dict[str, DenseTensor]]:
    """Keys and tensors of the rotary embedding of layers that see everything (or of all, where they are alike)."""
    values = rope_parameters(d, "full_attention")
    turned = next((layer.attention.rope for layer in spec.layers if layer.attention.rope is not None), None)
    if turned is None:
        _unsaid("no layer of it has a rotary embedding")
    base = float(values["rope_theta"])
    keys: dict[str, Any] = {"rope.freq_base": base, "rope.dimension_count": 2 * turned.inv_freq.size}
    if d.family.sliding_rope_theta is not None:
        keys["rope.freq_base_swa"] = float(rope_parameters(d, "sliding_attention")["rope_theta"])
    if d.family.gguf == "phi3":
        keys["rope.scaling.original_context_length"] = _original_length(d, values)
    kind = rope.rope_type(values)
    if kind == "default":
        return keys, {}
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(values["factor"])}, {}
    if kind == "yarn":
        return keys | _yarn(d, values, turned), {}
    if kind == "llama3":
        plain = rope.make({"rope_theta": base}, 2 * turned.inv_freq.size, max_position=1, length=1).inv_freq
        return keys, {"rope_freqs.weight": DenseTensor("float32", plain / turned.inv_freq)}
    if kind != "longrope":
        _unsaid(f"it has no rotary embedding of the kind {kind!r}")
    keys["rope.scaling.attn_factor"] = turned.factor
    return keys, {
        f"rope_factors_{which}.weight": DenseTensor("float32", np.asarray(values[f"{which}_factor"], np.float32))
        for which in ("long", "short")
    }


def _original_length(d: Described, values: Mapping[str, Any]) -> int:
    return int(values.get("original_max_position_embeddings") or d.integer("max_position_embeddings"))


def _yarn(d: Described, values: Mapping[str, Any], turned: Rope) -> dict[str, Any]:
    """llama.cpp multiplies `attn_factor` by YaRN's own 1 + 0.1 ln(factor)."""
    original = _original_length(d, values)
    factor = float(values.get("factor") or d.integer("max_position_embeddings") / original)
    keys = {"type": "yarn", "factor": factor, "original_context_length": original}
    usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    if not math.isclose(turned.factor, usual, rel_tol=CLOSE):
        keys["attn_factor"] = turned.factor / usual
    for name in ("beta_fast", "beta_slow"):
        if values.get(name) is not None:
            keys[f"yarn_{name}"] = float(values[name])
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


# -- what a reader will make of it -------------------------------------------------------------------------------
@dataclass(eq=False)
class Preview:
    """The file before it is written, as far as reading its configuration and its tokenizer goes; see `Checkpoint`."""

    config: Mapping[str, Any]
    tensors: Sequence[str]
    settings: Mapping[str, Tensor]
    path: Path = Path("preview.gguf")
    format: str = "gguf"
    nbytes: int = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> Tensor:
        return self.settings[name]

    def asset(self, filename: str) -> Path | None:
        return None

    def fingerprint(self) -> str:
        return ""


def check_spec(spec: ModelSpec, preview: Preview) -> None:
    """Raises UnsupportedModelError where the file would be read as another model."""
    other = difference(spec, read_spec(preview)[0])
    if other is not None:
        _unsaid(f"{other} would be read otherwise")


def _unsaid(why: str) -> NoReturn:
    raise UnsupportedModelError(
        f"GGUF cannot say what this model does: {why}.", "Write a folder instead, with the format compressed-tensors."
    )
