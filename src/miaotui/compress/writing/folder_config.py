"""config.json of a compressed folder: the original's, or one made of GGUF metadata, with what was done to the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.places import LINEARS, all_places
from miaotui.compress.specs import difference
from miaotui.compress.types import KEPT, LinearScheme, Place, Solution
from miaotui.errors import UnsupportedModelError, UsageError
from miaotui.model.families import describe, spec_of_config
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.model.tokenizer import Tokenizer
from miaotui.quant.scheme import ScaleType


@dataclass(frozen=True, eq=False)
class Target:
    """How the folder is laid out: its names, whether its head is tied, and the type of its dense tensors."""

    names: Names
    tied: bool
    type: ScaleType
    norm_offset: float
    """What its norms add to their stored weight."""


def target_of(solution: Solution) -> Target:
    """How a solution's folder is laid out. Raises UnsupportedModelError for a model with more than text in it."""
    if "text_config" in solution.source.config:
        raise UnsupportedModelError(
            "This model reads images too, and only its text part would be written.",
            "Compress the text model alone, such as one of Gemma 3's with 1B parameters.",
        )
    tied = solution.spec.tied_head and Place("head") not in set(solution.places())
    if solution.source.format == "gguf":
        family = describe(solution.source).family
        return Target(family.hf_names, tied, "bfloat16", family.norm_offset)
    stated = str(solution.source.config.get("dtype") or solution.source.config.get("torch_dtype") or "")
    kinds: dict[str, ScaleType] = {"float16": "float16", "float32": "float32"}
    return Target(solution.names, tied, kinds.get(stated, "bfloat16"), solution.spec.norm_offset)


def folder_config(solution: Solution, target: Target) -> dict[str, Any]:
    """The original's config.json with what was done to it; made from the metadata where it was a GGUF file.

    Raises UnsupportedModelError where a GGUF file's settings have no name there, UsageError for parts of one stacked
    matrix (q, k, v; gate, up) with different schemes.
    """
    _check_stacked(solution, target)
    if solution.source.format == "gguf":
        config = config_of_gguf(solution.source, solution.spec)
    else:
        config = {k: v for k, v in solution.source.config.items() if k != "quantization_config"}
    config["tie_word_embeddings"] = target.tied
    config["quantization_config"] = quantization_config(solution, target)
    return config


def _check_stacked(solution: Solution, target: Target) -> None:
    """Engines stack q, k and v, and gate and up: vLLM refuses parts of one stack with different schemes."""
    stacks: dict[Place, dict[LinearScheme, Place]] = {}
    for place in all_places(solution):
        if place.role in LINEARS and not place.bias:
            scheme = solution.schemes.get(place, KEPT)
            stacks.setdefault(replace(place, part=0), {}).setdefault(scheme, place)
    for schemes in stacks.values():
        if len(schemes) > 1:
            first, second = (place.name(target.names).removesuffix(".weight") for place in list(schemes.values())[:2])
            raise UsageError(
                f"{first} and {second} are read as one matrix but have different schemes.",
                "Give all parts of q, k and v, and of gate and up, the same scheme.",
            )


def quantization_config(solution: Solution, target: Target) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`: one group for each scheme."""
    coded: dict[LinearScheme, list[Place]] = {}
    for place, scheme in sorted(solution.schemes.items(), key=lambda item: item[0]):
        if not scheme.kept and not place.bias:
            coded.setdefault(scheme, []).append(place)
    formats = {scheme: _format(scheme) for scheme in coded}
    kept = _kept_linears(solution, target)
    one = len(coded) == 1 and all(place.layer >= 0 for place in next(iter(coded.values())))
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if one else _patterns(target.names, places),
            "format": formats[scheme],
            "weights": _weight_args(scheme),
            "input_activations": _input_args(scheme),
            "output_activations": None,
        }
        for index, (scheme, places) in enumerate(coded.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "version": "0.12.0",
        "format": next(iter(formats.values())) if len(set(formats.values())) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": _kv_args(solution),
    }


def _kept_linears(solution: Solution, target: Target) -> list[str]:
    """Names of linears that no group may take: the head, and what a recipe left alone."""
    kept = []
    for place in all_places(solution):
        scheme = solution.schemes.get(place)
        linear = place.role in LINEARS or place.role in ("router", "head")
        if linear and not place.bias and (scheme is None or scheme.kept):
            kept.append(place.name(target.names).removesuffix(".weight"))
    head = target.names.head
    return kept if head in kept or not solution.spec.tied_head or not target.tied else [*kept, head]


def _patterns(names: Names, places: Sequence[Place]) -> list[str]:
    """One regular expression for each kind of module, naming the layers, as vLLM's fused modules need."""
    layers: dict[str, list[int]] = {}
    found = []
    for place in places:
        stem = place.name(names).removesuffix(".weight")
        if place.layer < 0:
            found.append("re:.*" + re.escape(stem) + "$")
            continue
        layers.setdefault(stem.removeprefix(names.layers.format(place.layer)), []).append(place.layer)
    prefix = re.escape(names.layers).replace(re.escape("{}"), "({})")
    for stem, numbers in layers.items():
        found.append("re:" + prefix.format("|".join(map(str, sorted(numbers)))) + re.escape(stem) + "$")
    return found


def _format(scheme: LinearScheme) -> str:
    if scheme.fp8:
        return "float-quantized"
    return "pack-quantized" if scheme.inputs == "none" else "int-quantized"


def _weight_args(scheme: LinearScheme) -> dict[str, Any]:
    weights = scheme.weights
    size = None if weights is None else weights.group_size
    return _args(
        num_bits=8 if weights is None else weights.bits,
        type="float" if scheme.fp8 else "int",
        symmetric=True if weights is None else weights.symmetric,
        strategy="channel" if size is None else "group",
        group_size=size,
        dynamic=False,
    )


def _input_args(scheme: LinearScheme) -> dict[str, Any] | None:
    if scheme.inputs == "none":
        return None
    kind, _, when = scheme.inputs.partition("-")
    dynamic = when == "dynamic"
    return _args(
        num_bits=8,
        type="float" if kind == "fp8" else "int",
        symmetric=True,
        strategy="token" if dynamic else "tensor",
        group_size=None,
        dynamic=dynamic,
    )


def _kv_args(solution: Solution) -> dict[str, Any] | None:
    if not solution.kv_scales:
        return None
    kind = "int" if solution.kv_scheme == "int8" else "float"
    return _args(num_bits=8, type=kind, symmetric=True, strategy="tensor", group_size=None, dynamic=False)


def _args(**given: Any) -> dict[str, Any]:
    observer = None if given["dynamic"] else "minmax"
    return {**given, "block_structure": None, "actorder": None, "observer": observer, "observer_kwargs": {}}


def config_of_gguf(source: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """A config.json in transformers' vocabulary for a GGUF file's metadata.

    Raises UnsupportedModelError where transformers has no word for what the file says (Llama 3's rope as divisors).
    """
    described = describe(source)
    family, settings = described.family, dict(described.settings)
    if "divisors" in settings["rope_parameters"]:
        _unsaid("its rotary embedding is given by divisors")
    biases = [settings.pop(key) for key in ("qkv_bias", "out_bias", "mlp_bias")]
    settings |= {rule: has for rule, has in zip(family.biases, biases, strict=True) if isinstance(rule, str)}
    settings |= _rope_settings(settings.pop("rope_parameters"))
    if settings.get("rotary_dim") == settings.get("head_dim"):
        settings.pop("rotary_dim", None)
    named = {"architectures": [family.architectures[0]], "model_type": family.name, "dtype": "bfloat16"}
    tokenizer = Tokenizer.from_checkpoint(source)
    ends = [*spec.eos_token_ids, *tokenizer.eos_ids, None]
    made = {**named, **settings, "bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0]}
    other = difference(spec, spec_of_config(made))
    if other is not None:
        _unsaid(f"{other} would be read otherwise")
    return made


def _unsaid(why: str) -> NoReturn:
    raise UnsupportedModelError(
        f"config.json cannot say what this GGUF file does: {why}.",
        "Compress the model's safetensors instead, or write GGUF.",
    )


def _rope_settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The form that transformers 4 reads as well, where one can say it: `rope_theta` and `rope_scaling`."""
    if "full_attention" in rope:
        return {"rope_parameters": {kind: {"rope_type": "default", **values} for kind, values in rope.items()}}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta" and value is not None}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if "rope_type" in scaling else None}
