"""One layer: its transformations, then its rounding, from statistics that are known already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from miaotui.compress.methods.awq import awq
from miaotui.compress.methods.fp8 import Float8, fp8_weight
from miaotui.compress.methods.gptq import Factor, factor, gptq
from miaotui.compress.methods.grid import Quantised, check_width
from miaotui.compress.methods.hqq import hqq
from miaotui.compress.methods.rtn import rtn
from miaotui.compress.methods.smooth import smooth
from miaotui.compress.options import Steps
from miaotui.compress.types import Fp8Tensor, InputStatistics, Layer, LinearGroup, LinearScheme
from miaotui.compress.wiring import fold, foldable, shared
from miaotui.errors import UsageError
from miaotui.model.spec import ModelSpec
from miaotui.quant.tensor import GroupedTensor

ROWS_AT_ONCE = 8192
"""Of a table as long as a vocabulary, solved in pieces: rows are independent."""

Rounded = Quantised | Float8


@dataclass(eq=False)
class Rounding:
    """A group's codes, one for each weight (None: kept), and what they were made of after all transformations."""

    rounded: list[Rounded | None]
    exact: list[torch.Tensor] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Mean relative error of the outputs of those that were rounded."""
        errors = [one.error for one in self.rounded if one is not None]
        return sum(errors) / len(errors) if errors else 0.0


def scale_layer(spec: ModelSpec, layer: Layer, steps: Steps) -> None:
    """Smooth and scale a layer in place: what it answers does not change, what rounding costs does."""
    if steps.smooth is not None:
        for key in _coded(spec, layer):
            if steps.smooth.everywhere or layer.groups[key].role in ("qkv", "mlp_in"):
                _smooth(layer, key, steps.smooth.strength)
    if steps.awq is not None:
        for key in _coded(spec, layer):
            _awq(layer, key, steps)


def _coded(spec: ModelSpec, layer: Layer) -> Iterator[str]:
    """Groups that are coded and whose inputs can be scaled."""
    for key, group in layer.groups.items():
        coded = any(not scheme.kept for scheme in group.schemes)
        if coded and group.statistics is not None and foldable(spec, layer, key):
            yield key


def _smooth(layer: Layer, key: str, strength: float) -> None:
    group = layer.groups[key]
    found = group.statistics
    assert found is not None
    peak = shared(layer, key, torch.maximum(-found.low, found.high), "max")
    fold(layer, key, shared(layer, key, smooth(group.weights, peak, strength), "mean"))


def _awq(layer: Layer, key: str, steps: Steps) -> None:
    group = layer.groups[key]
    found, scheme = group.statistics, next(s.weights for s in group.schemes if not s.kept)
    if scheme is None:
        return
    assert found is not None
    assert steps.awq is not None
    mean = shared(layer, key, found.mean_abs, "mean")
    best = awq(group.weights, scheme, found.moment, mean, steps.awq, minimum=steps.minimum)
    fold(layer, key, shared(layer, key, best.scale, "mean"))


# -- rounding --------------------------------------------------------------------------------------------------------
def round_layer(layer: Layer, steps: Steps) -> dict[str, Rounding]:
    """Codes for every group, whose weights become what the codes mean."""
    return {key: round_group(group, steps) for key, group in layer.groups.items()}


def round_group(group: LinearGroup, steps: Steps) -> Rounding:
    """Weights of one scheme are solved as one matrix: they share their inputs, and rows are independent."""
    solution = Rounding([None] * len(group.weights), list(group.weights))
    found = group.statistics
    for scheme in dict.fromkeys(scheme for scheme in group.schemes if not scheme.kept):
        parts = [i for i, other in enumerate(group.schemes) if other == scheme]
        stacked = torch.cat([group.weights[i] for i in parts])
        for i, one in zip(parts, _split(solve(stacked, scheme, found, steps), group, parts), strict=True):
            solution.rounded[i] = one
            group.weights[i] = one.values
    return solution


def solve(
    weight: torch.Tensor,
    scheme: LinearScheme,
    found: InputStatistics | None,
    steps: Steps,
    factored: Factor | None = None,
) -> Rounded:
    """Codes of one matrix. Without statistics (nothing was measured, or no token came) nearest codes, fitted to the
    weight. `factored` is GPTQ's factor of the moment, where it was made before.
    """
    if not bool(torch.isfinite(weight).all()):
        raise UsageError("A weight is not finite.", "Check the model: does it answer sensibly?")
    moment = None if found is None else found.moment
    if scheme.weights is None:
        return fp8_weight(weight, "float32", moment)
    check_width(weight.shape[1], scheme.weights)
    if steps.rounder == "hqq":
        return hqq(weight, scheme.weights, steps.hqq, minimum=steps.minimum, moment=moment)
    if steps.rounder == "gptq" and moment is not None:
        return gptq(weight, scheme.weights, moment, steps.gptq, shared=factored, minimum=steps.minimum)
    how = steps.rtn.fit or "minmax" if steps.rounder == "rtn" else "mse"
    how = "mse" if how == "output" and moment is None else how
    return rtn(weight, scheme.weights, how=how, moment=moment, minimum=steps.minimum)


def _split(whole: Rounded, group: LinearGroup, parts: list[int]) -> Iterator[Rounded]:
    """One result for each of the matrices that were stacked."""
    start = 0
    for i in parts:
        rows = slice(start, start + group.weights[i].shape[0])
        start = rows.stop
        if isinstance(whole, Float8):
            tensor = whole.tensor
            yield Float8(type(tensor)(tensor.data[rows], tensor.scale[rows]), whole.values[rows], whole.error)
        else:
            yield Quantised(whole.tensor.rows(rows), whole.values[rows], whole.error)


def solve_table(table: torch.Tensor, scheme: LinearScheme, found: InputStatistics | None, steps: Steps) -> Rounded:
    """The embedding or the head, `[vocabulary, hidden]`, in pieces."""
    wanted = steps.rounder == "gptq" and found is not None and scheme.weights is not None
    factored = factor(found.moment, steps.gptq) if wanted and found is not None else None
    pieces = [solve(rows, scheme, found, steps, factored) for rows in torch.split(table, ROWS_AT_ONCE)]
    values = torch.cat([piece.values for piece in pieces])
    error = sum(piece.error * piece.values.shape[0] for piece in pieces) / len(values)
    first = pieces[0]
    if isinstance(first, Float8):
        codes = [piece.tensor for piece in pieces if isinstance(piece, Float8)]
        return Float8(
            Fp8Tensor(np.concatenate([c.data for c in codes]), np.concatenate([c.scale for c in codes])), values, error
        )
    tensors = [piece.tensor for piece in pieces if isinstance(piece, Quantised)]
    minima = [tensor.minimum for tensor in tensors if tensor.minimum is not None]
    tensor = GroupedTensor(
        tensors[0].scheme,
        np.concatenate([tensor.codes for tensor in tensors]),
        np.concatenate([tensor.scale for tensor in tensors]),
        np.concatenate(minima) if minima else None,
    )
    return Quantised(tensor, values, error)
