"""Frequencies of the rotary embedding, with every scaling that checkpoints ask for.

The numbers equal those of transformers' `modeling_rope_utils` in float32. Two of its kinds depend there on how long
the sequence has grown so far, which no cache of already turned keys can follow. Here they are fixed when the model is
loaded, from the longest sequence that it is loaded for (`length`, the `--max-model-len`):

- dynamic: the base is the one that transformers uses for a sequence exactly `length` long;
- longrope: the long factors when `length` exceeds the original context, else the short ones (as vLLM and llama.cpp do).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.ops import Rope
from miaotui.errors import CheckpointError, UnsupportedModelError

Floats = NDArray[np.float32]

PARAMETERS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "divided": {"divisors"},
}
"""What each kind reads beside the common ones. `divided` (frequencies over given divisors) is GGUF's rope_freqs."""

MAX_POSITION = 1 << 24
"""Longest sequence that a configuration may promise."""

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"}


def make(parameters: Mapping[str, Any], rotary_dim: int, *, max_position: int, length: int) -> Rope:
    """The rotary embedding of `rotary_dim` elements of a head.

    parameters: a config's `rope_parameters` (rope_type, rope_theta, …); max_position: the config's own context;
    length: the longest sequence it must serve. Raises UnsupportedModelError for a kind or key not known here.
    """
    kind = rope_type(parameters)
    _check(kind, parameters)
    try:
        with np.errstate(all="ignore"):
            frequencies, factor = _frequencies(kind, parameters, rotary_dim, max_position, length)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        _impossible(parameters, repr(error))
    if frequencies.shape != (rotary_dim // 2,):
        _impossible(parameters, f"{frequencies.size} frequencies where {rotary_dim // 2} are needed")
    if not np.isfinite(frequencies).all() or not math.isfinite(factor):
        _impossible(parameters, "their frequencies are not finite")
    return Rope(np.ascontiguousarray(frequencies, dtype=np.float32), factor)


def _impossible(parameters: Mapping[str, Any], why: str) -> NoReturn:
    cause = f"The rope parameters {str(dict(parameters))[:200]} are incomplete or impossible: {why[:100]}."
    raise CheckpointError(cause, "Take config.json from the model's original repository.")


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The kind's present name (`su` was longrope's first, `type` its first key)."""
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return "longrope" if kind == "su" else kind


def context(parameters: Mapping[str, Any], max_position: int, wanted: int | None) -> int:
    """The longest sequence to make the frequencies for: `wanted` within what this scaling reaches, else its own.

    `dynamic` stays at the original context unless more is wanted, because there its numbers are the unscaled ones.
    """
    try:
        reach = min(_reach(parameters, max_position), MAX_POSITION)
    except (TypeError, ValueError, ArithmeticError) as error:
        _impossible(parameters, repr(error))
    if wanted is not None:
        return min(wanted, reach)
    return max_position if rope_type(parameters) == "dynamic" else reach


def _reach(parameters: Mapping[str, Any], max_position: int) -> int:
    kind, factor = rope_type(parameters), float(parameters.get("factor") or 1.0)
    if kind in ("linear", "dynamic"):
        return max(1, int(max_position * factor))
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or max_position
        return max(max_position, int(original * factor))
    return max_position


def _check(kind: str, parameters: Mapping[str, Any]) -> None:
    if kind not in PARAMETERS:
        supported = ", ".join(sorted(set(PARAMETERS) - {"divided"}))
        raise UnsupportedModelError(f"The rope type {kind!r} is not supported.", f"Supported are {supported}.")
    for key, value in parameters.items():
        if value and key not in COMMON and not any(key in known for known in PARAMETERS.values()):
            raise UnsupportedModelError(
                f"The rope parameter {key!r} is not understood.",
                f"For {kind!r} these are: {', '.join(sorted(COMMON | PARAMETERS[kind]))}.",
            )


def _frequencies(kind: str, p: Mapping[str, Any], dim: int, max_position: int, length: int) -> tuple[Floats, float]:
    base = float(p["rope_theta"])
    original = p.get("original_max_position_embeddings") or max_position
    plain = _plain(base, dim)
    if kind == "linear":
        return (plain / np.float32(p["factor"])).astype(np.float32), 1.0
    if kind == "dynamic":
        return _dynamic(base, dim, float(p["factor"]), max_position, length), 1.0
    if kind == "llama3":
        return _llama3(plain, p, original), 1.0
    if kind == "yarn":
        return _yarn(base, dim, p, max_position, original)
    if kind == "longrope":
        return _longrope(base, dim, p, max_position, original, length)
    if kind == "divided":
        divisors: Floats = np.asarray(p["divisors"], np.float32)
        return plain / divisors, 1.0
    return plain, 1.0


def _powers(base: float, dim: int) -> Floats:
    """base^(2i / dim): the exponent in float32 as transformers has it, the power rounded once."""
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    powers: Floats = np.power(np.float64(base), exponents.astype(np.float64)).astype(np.float32)
    return powers


def _plain(base: float, dim: int) -> Floats:
    return np.float32(1.0) / _powers(base, dim)


def _dynamic(base: float, dim: int, factor: float, max_position: int, length: int) -> Floats:
    """NTK-aware scaling (bloc97, emozilla 2023) for a sequence of `length`."""
    longest = max(length, max_position)
    stretch = factor * longest / max_position - (factor - 1)
    return _plain(base * math.pow(stretch, dim / (dim - 2)), dim)


def _llama3(plain: Floats, p: Mapping[str, Any], original: int) -> Floats:
    """Llama 3.1's: short wavelengths stay, long ones are divided by factor, those between are blended."""
    factor, low, high = (np.float32(p[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelength = np.float32(2 * math.pi) / plain
    scaled = np.where(wavelength > original / low, plain / factor, plain)
    blend = (original / wavelength - low) / (high - low)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(between, (1 - blend) * scaled / factor + blend * scaled, scaled).astype(np.float32)


def _yarn(base: float, dim: int, p: Mapping[str, Any], max_position: int, original: int) -> tuple[Floats, float]:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, a ramp between."""
    factor = float(p.get("factor") or max_position / original)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - ramp
    powers = _powers(base, dim)
    mixed = 1 / (np.float32(factor) * powers) * (1 - keep) + 1 / powers * keep
    return mixed.astype(np.float32), _yarn_attention(factor, p)


def _yarn_attention(factor: float, p: Mapping[str, Any]) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


def _longrope(
    base: float, dim: int, p: Mapping[str, Any], max_position: int, original: int, length: int
) -> tuple[Floats, float]:
    """LongRoPE (Ding et al. 2024): one divisor for each frequency, a short and a long set."""
    divisors = np.asarray(p["long_factor" if length > original else "short_factor"], np.float32)
    factor = float(p.get("factor") or max_position / original)
    attention = p.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    powers = _powers(base, dim)
    return (1 / (divisors * powers)).astype(np.float32), float(attention)
