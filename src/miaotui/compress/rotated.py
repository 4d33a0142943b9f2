"""Rotations of a whole layer, with what calibration knew of it; see `methods.rotate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from miaotui.compress.methods.rotate import (
    absorb_norm,
    rotate_moment,
    rotate_output,
    rotate_output_moment,
    rotate_reader,
    rotate_values,
    rotate_writer,
    rotation,
)
from miaotui.compress.options import RotateOptions
from miaotui.compress.types import InputStatistics, Layer, Place
from miaotui.compress.wiring import value_slot
from miaotui.model.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Rotations:
    """r1 `[hidden, hidden]` and r2 `[head_dim, head_dim]`, or None."""

    r1: torch.Tensor | None
    r2: torch.Tensor | None

    @classmethod
    def of(cls, spec: ModelSpec, options: RotateOptions) -> Rotations:
        r1 = rotation(spec.hidden_size, options.seed) if options.r1 else None
        r2 = rotation(spec.layers[0].attention.head_dim, options.seed + 1) if options.r2 else None
        return cls(r1, r2)

    def layer(self, layer: Layer) -> None:
        """Rotate a layer in place: norms become ones, what reads the stream, writes to it and holds values turns."""
        if self.r1 is not None:
            self._stream(layer, self.r1)
        if self.r2 is not None:
            self._values(layer, self.r2)

    def _stream(self, layer: Layer, r: torch.Tensor) -> None:
        for norm, roles in (("attention_norm", ("qkv",)), ("mlp_norm", ("mlp_in", "expert_in"))):
            gamma = layer.norms[norm]
            for group in layer.groups.values():
                if group.role in roles:
                    group.weights = [rotate_reader(absorb_norm(w, gamma), r) for w in group.weights]
                    group.statistics = _turned(group.statistics, r, gamma)
            if norm == "mlp_norm" and layer.router is not None:
                layer.router = rotate_reader(absorb_norm(layer.router, gamma), r)
                layer.changed.add(Place("router", layer.index))
            layer.norms[norm] = torch.ones_like(gamma)
            layer.changed.add(Place(norm, layer.index))
        for group in layer.groups.values():
            if group.role in ("out", "mlp_out", "expert_out"):
                group.weights = [rotate_writer(w, r) for w in group.weights]
                if group.biases is not None:
                    group.biases = [rotate_writer(b, r) for b in group.biases]
                    layer.changed.update(replace(place, bias=True) for place in group.places)

    def _values(self, layer: Layer, r: torch.Tensor) -> None:
        values, out = value_slot(layer), layer.groups["out"]
        values.change(layer, lambda rows: rotate_values(rows, r))
        out.weights = [rotate_output(w, r) for w in out.weights]
        found = out.statistics
        if found is not None:
            out.statistics = _gaussian(rotate_output_moment(found.moment, r), found.rows)

    # -- the ends ----------------------------------------------------------------------------------------
    def embedding(self, table: torch.Tensor) -> torch.Tensor:
        return table if self.r1 is None else rotate_reader(table, self.r1)

    def head(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """The head with the last norm's weight in it."""
        return weight if self.r1 is None else rotate_reader(absorb_norm(weight, norm), self.r1)

    def head_statistics(self, found: InputStatistics | None, norm: torch.Tensor) -> InputStatistics | None:
        return found if self.r1 is None else _turned(found, self.r1, norm)

    def stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream as the rotated model has it."""
        return hidden if self.r1 is None else hidden @ self.r1


def _turned(found: InputStatistics | None, r: torch.Tensor, gamma: torch.Tensor) -> InputStatistics | None:
    return None if found is None else _gaussian(rotate_moment(found.moment, r, gamma), found.rows)


def _gaussian(moment: torch.Tensor, rows: int) -> InputStatistics:
    """Statistics of which only the moment is known: a sum of many channels is nearly Gaussian, E|x| = σ·√(2/π).

    The ranges are not known, and are said to be infinite.
    """
    deviation = (moment.diagonal().clamp(min=0) / rows).sqrt()
    unknown = torch.full_like(deviation, float("inf"))
    return InputStatistics(moment, deviation * math.sqrt(2 / math.pi), -unknown, unknown, rows)
