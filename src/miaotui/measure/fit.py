"""Will a model fit into this machine, and how fast could it be at the most? Told before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miaotui.backends.ops import BLOCK_SIZE
from miaotui.hardware.ceilings import Ceilings
from miaotui.measure.work import Cost, parameters, parameters_read
from miaotui.model.spec import ModelSpec

HEADROOM = 150 << 20
"""Bytes for Python, the tokenizer and a step's buffers."""

LEAST_CONTEXT = 256
"""A model that cannot hold this many positions is not said to fit."""


@dataclass(frozen=True)
class Fit:
    """Sizes in bytes; `context` is the most positions that fit, at most what the model was made for."""

    parameters: int
    weight_bytes: int
    step_bytes: int
    cache_bytes_per_token: int
    available: int
    context: int
    max_position: int

    @property
    def fits(self) -> bool:
        return self.context >= min(LEAST_CONTEXT, self.max_position)


def fit(spec: ModelSpec, weight_bytes: int, available: int, cache_bytes_per_value: int = 2) -> Fit:
    """`weight_bytes` of the files; what a step reads of them is taken by share of parameters."""
    total = parameters(spec)
    widths = sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in spec.layers)
    per_token = widths * cache_bytes_per_value
    room = max(0, available - weight_bytes - HEADROOM) // per_token
    return Fit(
        parameters=total,
        weight_bytes=weight_bytes,
        step_bytes=weight_bytes * parameters_read(spec) // total,
        cache_bytes_per_token=per_token,
        available=available,
        context=min(room, spec.max_position),
        max_position=spec.max_position,
    )


def ceilings_of(spec: ModelSpec, found: Fit, limits: Ceilings) -> dict[str, float]:
    """Tokens a second that this machine cannot exceed: one sequence at a short and a long context, and a prompt."""
    cost = Cost.of(spec, found.step_bytes, found.cache_bytes_per_token * BLOCK_SIZE, "auto")
    long = max(1, min(found.context, found.max_position))
    return {
        "decode-1@16": 1 / cost.seconds(cost.step([16]), limits),
        f"decode-1@{long}": 1 / cost.seconds(cost.step([long]), limits),
        "prefill-512": 512 / cost.seconds(cost.step([512], new_tokens=512), limits),
    }


def weight_bytes_of(spec: ModelSpec, config: Mapping[str, Any]) -> int:
    """About how large the weights of a config.json are, by its number type and quantisation: an estimate, to 10%."""
    dtype = config.get("dtype", config.get("torch_dtype"))
    dense = parameters(spec) * (4 if dtype == "float32" else 2)
    bits = _bits(config.get("quantization_config"))
    if bits is None:
        return dense
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied_head else 2)
    return int((parameters(spec) - tables) * (bits + 0.25) / 8) + 2 * tables  # a scale of 16 bits for some 64 codes


def _bits(quantization: Any) -> int | None:
    """Bits of a code by a `quantization_config` of GPTQ, AWQ or compressed-tensors; None without one."""
    if not isinstance(quantization, Mapping):
        return None
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and isinstance(weights.get("num_bits"), int):
            return int(weights["num_bits"])
    bits = quantization.get("bits")
    return bits if isinstance(bits, int) else None
