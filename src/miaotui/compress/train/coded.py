"""Students in integer codes: the grids that a compressed-tensors folder has, and folders with weights on such grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.methods.grid import Grid, quantised
from miaotui.compress.places import Model
from miaotui.compress.types import Coded, KvScheme, LinearScheme, Place
from miaotui.compress.writing.folder import write_folder
from miaotui.errors import UsageError
from miaotui.model.families import read_spec
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.quant.rounding import to_scale_type
from miaotui.quant.scheme import ScaleType
from miaotui.quant.tensor import DenseTensor, GroupedTensor

_NARROW: tuple[ScaleType, ...] = ("bfloat16", "float16")


def grids_of(model: Model, device: str = "cpu") -> dict[Place, Grid]:
    """The grid of each weight of a compressed-tensors folder that is in integer codes; none of any other checkpoint.

    Raises UsageError where inputs, keys and values are coded too, or weights are fp8.
    """
    config = model.checkpoint.config.get("quantization_config")
    if not isinstance(config, Mapping) or config.get("quant_method") != "compressed-tensors":
        return {}
    _check_weights_only(config)
    found = {}
    for place in model.places():
        tensor = None if place.bias else model.values(place)
        if isinstance(tensor, GroupedTensor) and tensor.perm is None:
            found[place] = _grid(tensor, device)
    return found


def _check_weights_only(config: Mapping[str, Any]) -> None:
    groups = (config.get("config_groups") or {}).values()
    inputs = any(group.get("input_activations") for group in groups)
    floats = any((group.get("weights") or {}).get("type") == "float" for group in groups)
    if inputs or floats or config.get("kv_cache_scheme"):
        raise UsageError(
            "The student codes more than weights as integers, which training cannot imitate.",
            "Train the model that it was made from, and compress it afterwards.",
        )


def _grid(tensor: GroupedTensor, device: str) -> Grid:
    scale = torch.from_numpy(np.array(tensor.scale, np.float32)).to(device)
    width = tensor.shape[1]
    scheme = replace(tensor.scheme, scale_type=_narrowest(tensor.scale))
    if tensor.minimum is None:
        return Grid(scheme, width, scale, torch.full_like(scale, float(scheme.zero)))
    zero = torch.round(-torch.from_numpy(np.array(tensor.minimum, np.float32)).to(device) / scale)
    return Grid(scheme, width, scale, zero)


def _narrowest(scale: np.ndarray[Any, np.dtype[np.float32]]) -> ScaleType:
    """The type that a file stores scales in: the first of _NARROW that holds them."""
    return next((kind for kind in _NARROW if np.array_equal(to_scale_type(scale, kind), scale)), "float32")


@dataclass(eq=False)
class _OnGrids:
    """A Solution of which every place is given: coded weights nearest on their grids, everything else as it is."""

    source: Checkpoint
    spec: ModelSpec
    names: Names
    values: Mapping[Place, torch.Tensor]
    grids: Mapping[Place, Grid]
    schemes: Mapping[Place, LinearScheme]
    input_scales: Mapping[Place, float] = field(default_factory=dict)
    kv_scales: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    kv_scheme: KvScheme = "none"

    def places(self) -> Sequence[Place]:
        return list(self.values)

    def tensor(self, place: Place) -> Coded:
        value = self.values[place].detach().float().cpu()
        if place not in self.grids:
            return DenseTensor("float32", value.numpy())
        grid = _on_cpu(self.grids[place])
        return quantised(grid, grid.codes(value), value).tensor


def write(plain: Path, values: Mapping[Place, torch.Tensor], grids: Mapping[Place, Grid], folder: Path) -> None:
    """A compressed-tensors folder of `plain`, a folder of these values as plain numbers."""
    source = open_checkpoint(plain)
    schemes = {place: LinearScheme(grid.scheme) for place, grid in grids.items()}
    write_folder(_OnGrids(source, *read_spec(source), values, grids, schemes), folder)


def _on_cpu(grid: Grid) -> Grid:
    zero = None if grid.zero is None else grid.zero.cpu()
    return replace(grid, scale=grid.scale.cpu(), zero=zero)
