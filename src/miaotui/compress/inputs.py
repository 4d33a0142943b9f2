"""What becomes of a linear's inputs in the artefact: codes of int8 or fp8, as whoever serves it will make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from miaotui.compress.methods.fp8 import fp8_activations, int8_activations, static_scale
from miaotui.compress.types import Layer, LinearGroup, Place
from miaotui.errors import UsageError

Change = Callable[[torch.Tensor], torch.Tensor]


def static_scales(layer: Layer) -> dict[Place, float]:
    """x ≈ scale · code, for every linear of a layer whose inputs have one scale.

    Raises UsageError where calibration does not know the inputs' range.
    """
    return {
        place: _scale(layer, group)
        for group in layer.groups.values()
        for place, scheme in zip(group.places, group.schemes, strict=True)
        if scheme.inputs.endswith("-static")
    }


def _scale(layer: Layer, group: LinearGroup) -> float:
    found = group.statistics
    if found is None:
        raise UsageError(
            f"No token of the calibration reached {group.role} of layer {layer.index}, so that its inputs' range is"
            " unknown.",
            "Give more calibration windows, or a scheme with dynamic inputs.",
        )
    peak = torch.maximum(-found.low, found.high).amax()
    assert bool(torch.isfinite(peak)), "ranges that nobody measured"
    kind = next(scheme.inputs for scheme in group.schemes if scheme.inputs.endswith("-static"))
    return static_scale(peak, "fp8" if kind == "fp8-static" else "int8")


def input_changes(layer: Layer, scales: dict[Place, float]) -> dict[str, Change]:
    """By linear, for those whose inputs are coded."""
    return {key: change for key, group in layer.groups.items() if (change := _change(group, scales)) is not None}


def _change(group: LinearGroup, scales: dict[Place, float]) -> Change | None:
    kinds = {scheme.inputs for scheme in group.schemes}
    if kinds == {"none"}:
        return None
    kind = next(iter(kinds))
    if kind == "int8-dynamic":
        return int8_activations
    if kind == "fp8-dynamic":
        return fp8_activations
    scale = torch.tensor(scales[group.places[0]])
    return partial(int8_activations if kind == "int8-static" else fp8_activations, scale=scale)
