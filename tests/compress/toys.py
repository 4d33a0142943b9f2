"""Solutions held in memory: the linears of a tiny model rounded to nearest, as compression hands them to a writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.methods.fp8 import fp8_weight
from miaotui.compress.places import LINEARS, Model
from miaotui.compress.recipe import parse_scheme
from miaotui.compress.types import Coded, KvScheme, LinearScheme, Place
from miaotui.model.families import read_spec
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.quant.rounding import Minimum, round_to_nearest
from miaotui.quant.tensor import DenseTensor
from tests.golden import gguf_files, models


@dataclass(eq=False)
class Toy:
    """A solution; see `Solution`."""

    source: Checkpoint
    spec: ModelSpec
    names: Names
    schemes: dict[Place, LinearScheme]
    tensors: dict[Place, Coded]
    input_scales: Mapping[Place, float] = field(default_factory=dict)
    kv_scales: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    kv_scheme: KvScheme = "none"

    def places(self) -> Sequence[Place]:
        return list(self.tensors)

    def tensor(self, place: Place) -> Coded:
        return self.tensors[place]


def toy_case(name: str, **settings: Any) -> models.Case:
    """The golden case of that name with sizes that are whole groups of 32 (and 64 in the residual stream)."""
    case = next(case for case in models.CASES if case.name == name)
    sizes = {"hidden_size": 192, "intermediate_size": 128, "head_dim": 32}
    if "moe_intermediate_size" in case.settings:
        sizes["moe_intermediate_size"] = 32
    return models.Case(case.name, case.family, case.prefix, {**case.settings, **sizes, **settings}, case.length)


def write_original(case: models.Case, folder: Path, kind: str = "safetensors") -> Path:
    """The case's random model, as a folder in bfloat16, or as a GGUF file in float32."""
    model = models.make(case)
    if kind == "gguf":
        gguf_files.write(model, case, folder / f"{case.name}.gguf")
        return folder / f"{case.name}.gguf"
    model.bfloat16().save_pretrained(folder / case.name)
    return folder / case.name


def solve(
    path: Path,
    scheme: str | Callable[[Place], str],
    *,
    minimum: Minimum = "zero_point",
    norms: bool = True,
    roles: frozenset[str] = LINEARS,
) -> Toy:
    """Round the linears of a checkpoint; static inputs get a made-up scale, one norm of each layer is "folded"."""
    checkpoint = open_checkpoint(path)
    spec, names = read_spec(checkpoint)
    model = Model(checkpoint, spec, names)
    toy = Toy(checkpoint, spec, names, {}, {})
    scales: dict[Place, float] = {}
    for place in model.places():
        if place.role == "mlp_post_norm" or (norms and place.role == "mlp_norm" and not place.bias):
            toy.tensors[place] = DenseTensor("float32", model.values(place).dense32() * np.float32(1.37))
        if place.role not in roles or place.bias:
            continue
        chosen = toy.schemes[place] = parse_scheme(scheme if isinstance(scheme, str) else scheme(place))
        values = np.array(model.values(place).dense32())
        if chosen.fp8:
            toy.tensors[place] = fp8_weight(torch.from_numpy(values)).tensor
        elif chosen.weights is not None:
            toy.tensors[place] = round_to_nearest(values, chosen.weights, minimum)
        if chosen.inputs.endswith("static"):
            scales[place] = 0.01 + 0.001 * place.layer
    toy.input_scales = scales
    return toy


def decoded(toy: Toy, place: Place) -> np.ndarray[Any, Any]:
    """The values of a changed place, by numpy alone."""
    tensor = toy.tensors[place]
    if hasattr(tensor, "dense32"):
        return np.asarray(tensor.dense32())
    codes = torch.from_numpy(tensor.data).view(torch.float8_e4m3fn).float().numpy()
    return np.asarray(codes * tensor.scale)
