"""What is written of a solved layer, and of the ends of a model: codes, and everything else that changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from miaotui.compress.layers import read_matrix
from miaotui.compress.methods.fp8 import static_scale
from miaotui.compress.places import Model
from miaotui.compress.solve import Rounding, solve_table
from miaotui.compress.solved import Part
from miaotui.compress.types import Coded, InputStatistics, Layer, LinearScheme, Place
from miaotui.compress.work import Work
from miaotui.quant.rounding import bfloat16_bits, to_scale_type
from miaotui.quant.scheme import ScaleType
from miaotui.quant.tensor import DenseTensor


def kv_scales(work: Work, layer: Layer) -> tuple[float, float] | None:
    kind = work.recipe.kv_cache
    if kind == "none":
        return None
    assert layer.key_peaks is not None, "the cache was not measured"
    assert layer.value_peaks is not None
    return static_scale(layer.key_peaks, kind), static_scale(layer.value_peaks, kind)


def layer_part(
    work: Work,
    layer: Layer,
    rounded: Mapping[str, Rounding],
    scales: dict[Place, float],
    kv: tuple[float, float] | None,
) -> Part:
    """A solved layer as it is written: codes, and everything else that changed."""
    part = Part(layer.index, input_scales=scales, kv_scales=kv)
    for key, group in layer.groups.items():
        for i, place in enumerate(group.places):
            part.schemes[place] = group.schemes[i]
            one = rounded[key].rounded[i]
            if one is not None:
                part.tensors[place] = one.tensor
            elif not np.array_equal(group.weights[i].numpy(), work.model.values(place).dense32()):
                part.tensors[place] = dense(group.weights[i], work.scale_type)
            bias = replace(place, bias=True)
            if group.biases is not None and bias in layer.changed:
                part.tensors[bias] = dense(group.biases[i], "float32")
        if any(one is not None for one in rounded[key].rounded):
            part.errors[key] = rounded[key].error
    for place in layer.changed:
        if place.role == "router":
            assert layer.router is not None
            part.tensors[place] = dense(layer.router, "float32")
        elif place.role in layer.norms:
            part.tensors[place] = dense((layer.norm_biases if place.bias else layer.norms)[place.role], "float32")
    return part


def ends_part(work: Work, statistics: InputStatistics | None = None) -> Part:
    """The embedding, the last norm and the head, as far as anything becomes of them."""
    model, part, turned = work.model, Part(-1), work.rotations is not None and work.rotations.r1 is not None
    embedding, head = work.table_scheme("embedding"), work.table_scheme("head")
    if turned or not embedding.kept:
        table = read_matrix(model, "embedding")
        table = table if work.rotations is None else work.rotations.embedding(table)
        _end(work, part, Place("embedding"), table, embedding, None)
        del table
    if not turned and (model.spec.tied_head or head.kept):
        return part
    weight = read_matrix(model, "head")
    known = statistics
    if known is None and work.statistics is not None and not head.kept:
        known = work.statistics.head()
        if turned and work.rotations is not None:
            known = work.rotations.head_statistics(known, _last_norm(model))
    if turned and work.rotations is not None:
        gamma = _last_norm(model)
        weight = work.rotations.head(weight, gamma)
        part.tensors[Place("norm")] = dense(torch.ones_like(gamma), "float32")
    _end(work, part, Place("head"), weight, head, known)
    return part


def _end(
    work: Work, part: Part, place: Place, table: torch.Tensor, scheme: LinearScheme, found: InputStatistics | None
) -> None:
    part.schemes[place] = scheme
    if scheme.kept:
        part.tensors[place] = dense(table, work.scale_type)
        return
    one = solve_table(table, scheme, found, work.steps)
    part.tensors[place] = one.tensor
    part.errors[place.role] = one.error


def _last_norm(model: Model) -> torch.Tensor:
    return torch.from_numpy(np.array(model.values(Place("norm")).dense32()))


def dense(values: torch.Tensor, kind: ScaleType) -> Coded:
    """A tensor that is not coded, rounded to a type."""
    array = np.ascontiguousarray(values.numpy(), np.float32)
    if kind == "bfloat16":
        return DenseTensor(kind, bfloat16_bits(array))
    return DenseTensor(kind, to_scale_type(array, kind).astype(np.float16) if kind == "float16" else array)
