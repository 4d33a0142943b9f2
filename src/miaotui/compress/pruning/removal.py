"""What it costs that blocks are left out: how far the next token's probabilities move, over a few windows.

All variants go through the layers together, so that each layer is read once. One that has not left out anything yet is
the model itself, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from miaotui.compress.calibrate import FinalNorm
from miaotui.compress.layers import read_layer, read_matrix, run_layer
from miaotui.compress.places import Model
from miaotui.compress.windows import WindowLinear, WindowOps

ROWS_AT_ONCE = 256
"""Tokens whose probabilities of the whole vocabulary are held at a time."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Streams:
    """Residual streams `[windows, length, hidden]` after the last layer: of the model, and of each variant."""

    model: Model
    whole: torch.Tensor
    without: list[torch.Tensor]

    def costs(self, product: torch.dtype) -> list[float]:
        """Mean KL(model ‖ variant) of the next token, in nats, of each variant."""
        probabilities = _Ends(self.model, product).log_probabilities
        totals = [0.0] * len(self.without)
        whole, others = self.whole.flatten(0, 1), [stream.flatten(0, 1) for stream in self.without]
        for start in range(0, len(whole), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            meant = probabilities(whole[rows])
            for i, other in enumerate(others):
                found = probabilities(other[rows])
                totals[i] += float((meant.exp() * (meant - found)).sum(dim=1).double().sum())
        return [total / len(whole) for total in totals]


def run_without(
    model: Model,
    tokens: torch.Tensor,
    variants: Sequence[frozenset[int]] = (),
    *,
    product: torch.dtype = torch.float32,
    tell: Tell = lambda done, total: None,
) -> Streams:
    """Put tokens `[windows, length]` through the model, and through it without the blocks of each variant.

    Memory: one layer, and a residual stream for each variant.
    """
    spec = model.spec
    ops = WindowOps(tokens.shape[1], tokens=tokens)
    table = WindowLinear((read_matrix(model, "embedding"),), key="embedding")
    whole = ops.embed(table, scale=spec.embedding_scale).view(*tokens.shape, -1)
    without: list[torch.Tensor | None] = [None] * len(variants)
    for index in range(len(spec.layers)):
        layer = read_layer(model, index)
        step = partial(run_layer, spec, layer, product=product)
        for i, variant in enumerate(variants):
            stream = without[i]
            if index in variant:
                without[i] = whole if stream is None else stream
            elif stream is not None:
                without[i] = step(stream)
        whole = step(whole)
        tell(index + 1, len(spec.layers))
    return Streams(model, whole, [whole if stream is None else stream for stream in without])


class _Ends:
    """The last norm and the head."""

    def __init__(self, model: Model, product: torch.dtype) -> None:
        self.spec = model.spec
        self.ops = WindowOps(1, product=product)
        self.head = WindowLinear((read_matrix(model, "head").to(product),), key="head")
        self.norm = FinalNorm(model)

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token `[rows, vocabulary]`, after streams `[rows, hidden]`."""
        spec = self.spec
        logits = self.ops.logits(self.norm(hidden), self.head, scale=spec.logits_scale, softcap=spec.logits_softcap)
        return torch.log_softmax(logits, dim=1)
