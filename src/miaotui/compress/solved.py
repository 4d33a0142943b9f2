"""What became of each layer, on disk: written once a layer is solved, read by whoever writes the artefact.

One safetensors file a layer. A file names the recipe, model and text it belongs to, so that one that was left behind is
taken up again only where all of these are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.write import Stored, write_safetensors
from miaotui.compress.recipe import parse_scheme, scheme_name
from miaotui.compress.types import Coded, Fp8Tensor, KvScheme, LinearScheme, Place
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import DenseTensor, GroupedTensor

TYPES = {"uint8": "U8", "float32": "F32", "uint16": "U16", "float16": "F16"}


@dataclass(eq=False)
class Part:
    """A solved layer, or the embedding with the last norm and the head (layer −1).

    errors: by linear, ‖ΔW·X‖² / ‖W·X‖² of what was rounded. streams: marks of the residual streams after it.
    """

    layer: int
    tensors: dict[Place, Coded] = field(default_factory=dict)
    schemes: dict[Place, LinearScheme] = field(default_factory=dict)
    input_scales: dict[Place, float] = field(default_factory=dict)
    kv_scales: tuple[float, float] | None = None
    errors: dict[str, float] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Mean of its linears' errors."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0


def path_of(folder: Path, layer: int) -> Path:
    return folder / ("ends.safetensors" if layer < 0 else f"layer-{layer:03d}.safetensors")


def save(folder: Path, part: Part, belongs_to: str) -> None:
    """Whole or not at all."""
    arrays: dict[str, NDArray[Any]] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for place, tensor in part.tensors.items():
        key = _key(place)
        if isinstance(tensor, Fp8Tensor):
            arrays |= {f"{key}/data": tensor.data, f"{key}/scale": tensor.scale}
            kinds[key] = {"kind": "fp8"}
        elif isinstance(tensor, GroupedTensor):
            arrays |= {f"{key}/codes": tensor.codes, f"{key}/scale": tensor.scale}
            if tensor.minimum is not None:
                arrays[f"{key}/minimum"] = tensor.minimum
            kinds[key] = {"kind": "grouped", **asdict(tensor.scheme)}
        else:
            assert isinstance(tensor, DenseTensor), f"{place} is neither coded nor dense"
            arrays[f"{key}/data"] = tensor.data
            kinds[key] = {"kind": "dense", "type": tensor.type}
    about = {
        "belongs_to": belongs_to,
        "tensors": kinds,
        "schemes": {_key(place): [scheme_name(s), _scale_type(s)] for place, s in part.schemes.items()},
        "input_scales": {_key(place): scale for place, scale in part.input_scales.items()},
        "kv_scales": part.kv_scales,
        "errors": part.errors,
        "streams": part.streams,
    }
    stored = [Stored(name, TYPES[str(array.dtype)], array.shape) for name, array in arrays.items()]
    write_safetensors(path_of(folder, part.layer), stored, arrays.__getitem__, {"about": json.dumps(about)})


def about(folder: Path, layer: int, belongs_to: str) -> Part | None:
    """A part without its tensors; None where there is none that belongs to this."""
    try:
        with safe_open(path_of(folder, layer), framework="numpy") as file:
            found = json.loads(file.metadata()["about"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if found["belongs_to"] != belongs_to:
        return None
    kv = found["kv_scales"]
    return Part(
        layer,
        {},
        {_place(key): parse_scheme(name, kind) for key, (name, kind) in found["schemes"].items()},
        {_place(key): scale for key, scale in found["input_scales"].items()},
        None if kv is None else (kv[0], kv[1]),
        found["errors"],
        found["streams"],
    )


def tensors(path: Path) -> dict[Place, dict[str, Any]]:
    """The places that a part's file holds, with what kind of tensor each is."""
    with safe_open(path, framework="numpy") as file:
        kinds = json.loads(file.metadata()["about"])["tensors"]
    return {_place(key): kind for key, kind in kinds.items()}


def _read(path: Path, place: Place, kind: Mapping[str, Any]) -> Coded:
    key = _key(place)
    with safe_open(path, framework="numpy") as file:
        if kind["kind"] == "fp8":
            return Fp8Tensor(file.get_tensor(f"{key}/data"), file.get_tensor(f"{key}/scale"))
        if kind["kind"] == "grouped":
            scheme = QuantScheme(kind["bits"], kind["group_size"], kind["symmetric"], kind["scale_type"])
            minimum = f"{key}/minimum"
            floor = file.get_tensor(minimum) if minimum in file.keys() else None  # noqa: SIM118
            return GroupedTensor(scheme, file.get_tensor(f"{key}/codes"), file.get_tensor(f"{key}/scale"), floor)
        return DenseTensor(kind["type"], file.get_tensor(f"{key}/data"))


def _key(place: Place) -> str:
    expert = "" if place.expert is None else str(place.expert)
    return f"{place.role}/{place.layer}/{place.part}/{expert}/{'bias' if place.bias else 'weight'}"


def _place(key: str) -> Place:
    role, layer, part, expert, what = key.split("/")
    return Place(role, int(layer), int(part), int(expert) if expert else None, what == "bias")


def _scale_type(scheme: LinearScheme) -> str:
    return scheme.weights.scale_type if scheme.weights is not None else "bfloat16"


@dataclass(frozen=True, eq=False)
class Solved:
    """A `Solution` whose tensors lie in the parts' files of a folder."""

    source: Checkpoint
    spec: ModelSpec
    names: Names
    kv_scheme: KvScheme
    folder: Path
    parts: Sequence[Part]

    @cached_property
    def _kinds(self) -> dict[Place, tuple[Path, dict[str, Any]]]:
        paths = [path_of(self.folder, part.layer) for part in self.parts]
        return {place: (path, kind) for path in paths for place, kind in tensors(path).items()}

    @cached_property
    def schemes(self) -> Mapping[Place, LinearScheme]:
        return {place: scheme for part in self.parts for place, scheme in part.schemes.items()}

    @cached_property
    def input_scales(self) -> Mapping[Place, float]:
        return {place: scale for part in self.parts for place, scale in part.input_scales.items()}

    @cached_property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        return {part.layer: part.kv_scales for part in self.parts if part.kv_scales is not None}

    def places(self) -> Sequence[Place]:
        return list(self._kinds)

    def tensor(self, place: Place) -> Coded:
        path, kind = self._kinds[place]
        return _read(path, place, kind)


class Planned(Solved):
    """Schemes that nothing was solved for yet, to ask a writer whether it could hold them."""

    def places(self) -> Sequence[Place]:
        return []
