"""What each layer's coded weights cost by themselves: how far the next token's probabilities move when only they are
the artefact's, and all others the original's.

All variants go through the layers together, beginning where they differ, so that each layer is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from miaotui.checkpoint import Checkpoint, open_checkpoint, resolve
from miaotui.compress.layers import read_layer, read_matrix, run_layer
from miaotui.compress.places import Model
from miaotui.compress.pruning.removal import Streams
from miaotui.compress.types import Layer
from miaotui.compress.windows import WindowLinear, WindowOps
from miaotui.measure.quality_data import Ids
from miaotui.measure.work import parameters
from miaotui.model.families import read_spec
from miaotui.model.spec import ModelSpec

TOKENS = 96
ROLES = ("qkv", "out", "mlp_in", "mlp_out")
FOLDING = ("awq", "smooth", "rotate")
"""Steps that move factors between a layer's linears: only all of them together mean the same as before."""
ALL = "all"


@dataclass(frozen=True)
class Cost:
    """Mean KL(original ‖ variant) in nats, with one layer's linears of a role (or all) coded."""

    layer: int
    role: str
    kl: float


def operations(spec: ModelSpec, roles: int) -> float:
    """About how many the measurement takes, a multiply-add being two."""
    layers = len(spec.layers)
    head = spec.vocab_size * spec.hidden_size
    body = (parameters(spec) - head) / layers
    return 2.0 * TOKENS * roles * layers * (layers / 2 * body + head)


def roles_of(method: str) -> tuple[str, ...]:
    """What can be told apart of weights that were coded by a method."""
    return (ALL,) if any(step in FOLDING for step in method.split("+")) else ROLES


def measure(original: str, artefact: str, tokens: Ids, roles: tuple[str, ...]) -> list[Cost]:
    """Every layer's cost for the first `TOKENS` of `tokens`. Memory: two layers, and a stream for each variant."""
    models = [Model(checkpoint, *read_spec(checkpoint)) for checkpoint in map(_open, (original, artefact))]
    with torch.no_grad():
        return _measure(models[0], models[1], torch.from_numpy(np.array(tokens[None, :TOKENS], np.int64)), roles)


def _open(model: str) -> Checkpoint:
    return open_checkpoint(resolve(model))


def _measure(model: Model, coded: Model, tokens: torch.Tensor, roles: tuple[str, ...]) -> list[Cost]:
    spec = model.spec
    ops = WindowOps(tokens.shape[1], tokens=tokens)
    table = WindowLinear((read_matrix(model, "embedding"),), key="embedding")
    whole = ops.embed(table, scale=spec.embedding_scale).view(*tokens.shape, -1)
    names: list[tuple[int, str]] = []
    streams = whole[:0]  # of the variants so far, as if they were windows of one text
    for index in range(len(spec.layers)):
        layer = read_layer(model, index)
        after = run_layer(spec, layer, torch.cat([whole, streams]))
        begun = []
        for role, variant in _variants(layer, read_layer(coded, index), roles):
            names.append((index, role))
            begun.append(run_layer(spec, variant, whole))
        whole, streams = after[:1], torch.cat([after[1:], *begun])
    costs = Streams(model, whole, list(streams[:, None])).costs(torch.float32)
    return [Cost(index, role, max(0.0, kl)) for (index, role), kl in zip(names, costs, strict=True)]


def _variants(layer: Layer, coded: Layer, roles: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    """The layer with only a role's linears coded; of experts, all together."""
    for role in roles:
        if role == ALL:
            yield role, coded
        elif role in layer.groups:
            yield role, replace(layer, groups={**layer.groups, role: coded.groups[role]})
