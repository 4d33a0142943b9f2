"""What a family of decoders is, as data. `families.py` fills it from a checkpoint's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miaotui.backends.ops import Activation, Attention


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One decoder layer's switches."""

    attention: Attention


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Everything about a model that is not a weight. `decoder.py` reads this and nothing else."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_position: int
    layers: tuple[LayerSpec, ...]
    activation: Activation
    norm_eps: float
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    gated_mlp: bool = True
    tied_head: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
