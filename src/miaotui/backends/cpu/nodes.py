"""The decoder's step as it was recorded: values and the nodes that make them, before they become native ops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.cpu.weights import Linear, Matrix
from miaotui.backends.ops import Activation, Attention, ExpertsWeight, NormWeight


@dataclass(eq=False)
class Value:
    """A float32 matrix `[rows, width]`: a row for each token of the step, or for each logits row."""

    width: int
    of_logits: bool = False


@dataclass(eq=False)
class Node:
    """One op. `inputs` are read, `output` is written; the same value for both means in place."""

    inputs: list[Value]
    output: Value


@dataclass(eq=False)
class EmbedNode(Node):
    table: Matrix
    scale: float


@dataclass(eq=False)
class NormNode(Node):
    """inputs: x, and what is added to the result if there is a second one."""

    weight: NormWeight


@dataclass(eq=False)
class LinearNode(Node):
    """inputs: x, and the residual if there is a second one. `norm`, `activation` and `gated` come from fusing."""

    weight: Linear
    scale: float = 1.0
    softcap: float = 0.0
    norm: NormWeight | None = None
    activation: Activation | None = None
    gated: bool = False
    exact: bool = False
    """Never quantise the input, whatever the weight."""
    hands_on: bool = False
    """The result goes to the next linear quantised, and that one is `handed` it."""
    handed: bool = False


@dataclass(eq=False)
class RopeNode(Node):
    layer: int
    attention: Attention
    q_norm: NormWeight | None
    k_norm: NormWeight | None


@dataclass(eq=False)
class AttentionNode(Node):
    layer: int
    attention: Attention


@dataclass(eq=False)
class ActivateNode(Node):
    activation: Activation
    gated: bool


@dataclass(eq=False)
class SelectNode(Node):
    pass


@dataclass(eq=False)
class ExpertsNode(Node):
    """inputs: x, the router's logits, and the residual if there is a third one."""

    weight: ExpertsWeight
    activation: Activation
    top_k: int
    normalise: bool


def contiguous(values: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    return None if values is None else np.ascontiguousarray(values, dtype=np.float32)
