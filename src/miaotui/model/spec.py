"""What a family of decoders is, as data. `families.py` fills it from a checkpoint's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miaotui.backends.ops import Activation, Attention


@dataclass(frozen=True)
class ExpertsSpec:
    """A routed MLP: each token goes through `top_k` of `count` experts, each `width` wide."""

    count: int
    top_k: int
    width: int
    normalise: bool
    """Divide the chosen experts' probabilities by their sum."""


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One decoder layer's switches."""

    attention: Attention
    experts: ExpertsSpec | None = None
    """None: a dense MLP."""


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Everything about a model that is not a weight. `decoder.py` reads this and nothing else."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_position: int
    """The longest sequence that the rotary embedding was made for."""
    layers: tuple[LayerSpec, ...]
    activation: Activation
    norm_eps: float
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    pre_norm: bool = True
    """Normalise what goes into attention and MLP."""
    post_norm: bool = False
    """Normalise what comes out of attention and MLP, before it is added to the residual."""
    qk_norm: bool = False
    """Normalise q and k before the rotary embedding; the weight's width tells over a head or over all heads."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    tied_head: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
