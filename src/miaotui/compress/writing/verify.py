"""An artefact read back and compared, bit for bit, with what compression meant to write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.places import NORMS, Model, all_places
from miaotui.compress.specs import difference
from miaotui.compress.types import KEPT, Fp8Tensor, Place, Solution
from miaotui.compress.writing.gguf_config import copied_metadata
from miaotui.compress.writing.gguf_text import tokenizer_difference
from miaotui.errors import CheckpointError
from miaotui.model.families import read_spec
from miaotui.model.tokenizer import Tokenizer
from miaotui.quant import pack
from miaotui.quant.rounding import to_scale_type
from miaotui.quant.tensor import BlockTensor, DenseTensor, GroupedTensor, Tensor


def verify(solution: Solution, path: Path) -> None:
    """Read a folder or a GGUF file as our engine does, one tensor at a time, and compare all of it with a solution.

    Codes, scales and minima are compared as such, everything else by value. Raises CheckpointError, naming the tensor,
    for the first that differs, is missing or is left over; and where the configuration is read as another model's.
    """
    checkpoint = open_checkpoint(path)
    spec, names = read_spec(checkpoint)
    other = difference(solution.spec, spec)
    if other is not None:
        _wrong(path, f"its configuration is of another model: {other}")
    artefact = Model(checkpoint, spec, names)
    places = all_places(solution)
    _check_names(solution, artefact, places)
    compare = _Comparison(solution, artefact)
    for place in places:
        compare.check(place)
    if checkpoint.format == "gguf":
        _check_metadata(solution.source, checkpoint)
    else:
        _check_scales(solution, artefact, checkpoint)


class _Comparison:
    """One place after the other."""

    def __init__(self, solution: Solution, artefact: Model) -> None:
        self.solution = solution
        self.artefact = artefact
        self.original = Model(solution.source, solution.spec, solution.names)
        self.changed = frozenset(solution.places())

    def check(self, place: Place) -> None:
        scheme = self.solution.schemes.get(place, KEPT)
        if scheme.weights is not None:
            what = self._codes(place)
        elif scheme.fp8:
            what = self._floats(place)
        else:
            what = self._dense(place)
        if what is not None:
            _wrong(self.artefact.checkpoint.path, f"{self.artefact.name(place)!r} has other {what} than were computed")

    def _codes(self, place: Place) -> str | None:
        """What differs between codes that were meant and those that are there."""
        meant, found = self.solution.tensor(place), self.artefact.stored(place)
        if isinstance(found, BlockTensor):
            found = pack.grouped(found)
        if not isinstance(found, GroupedTensor):
            return "numbers"
        assert isinstance(meant, GroupedTensor), f"{place} is not what its scheme says"
        ours, theirs = _affine(meant), _affine(found)
        return next((key for key in ours if not _same(ours[key], theirs[key])), None)

    def _floats(self, place: Place) -> str | None:
        """e4m3 is compared as the numbers that it stands for: each code has its own."""
        meant, found = self.solution.tensor(place), self.artefact.stored(place)
        assert isinstance(meant, Fp8Tensor), f"{place} is not what its scheme says"
        return None if _same(pack.e4m3(meant.data) * meant.scale, found.dense32()) else "numbers"

    def _dense(self, place: Place) -> str | None:
        if place not in self.changed:
            one, other = self.original.stored(place), self.artefact.stored(place)
            if isinstance(one, DenseTensor) and isinstance(other, DenseTensor) and _same(one.data, other.data):
                return None  # to the bit, and no copies of what may be the largest tensors
        found = self.artefact.values(place)
        coded = False
        if place in self.changed:
            changed = self.solution.tensor(place)
            assert not isinstance(changed, Fp8Tensor), f"{place} is fp8 and its scheme does not say so"
            meant = changed.dense32()
        else:
            original = self.original.values(place)
            meant, coded = original.dense32(), not isinstance(original, DenseTensor)
        return None if _same(self._as_stored(meant, place, found, coded), found.dense32()) else "numbers"

    def _as_stored(self, meant: NDArray[np.float32], place: Place, found: Tensor, coded: bool) -> NDArray[np.float32]:
        """What the format leaves of a number: an offset taken off and added again; the original's codes as floats."""
        offset = np.float32(self.artefact.spec.norm_offset)
        if place.role in NORMS and not place.bias and offset:
            return (meant - offset) + offset
        if coded and isinstance(found, DenseTensor):
            return to_scale_type(meant, found.type)
        return meant


def _affine(tensor: GroupedTensor) -> Mapping[str, NDArray[Any]]:
    """Codes counted from the one that means 0, where a scheme has one, however wide the format stores them."""
    assert tensor.perm is None, "nobody writes permuted columns"
    if tensor.minimum is None:
        zeros: NDArray[Any] = np.full(tensor.scale.shape, tensor.scheme.zero, np.int16)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.rint(-tensor.minimum / tensor.scale)
        if not np.array_equal(-(zeros * tensor.scale).astype(np.float32), tensor.minimum):
            return {"scales": tensor.scale, "minima": tensor.minimum, "codes": tensor.codes}
    width = tensor.shape[-1]
    spread = np.repeat(zeros.astype(np.int16), tensor.scheme.group_size or width, axis=-1)[..., :width]
    return {"scales": tensor.scale, "codes": tensor.codes.astype(np.int16) - spread}


def _same(one: NDArray[Any], other: NDArray[Any] | None) -> bool:
    """Bit for bit: −0 is not 0, and a nan is itself."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(np.array_equal(np.ascontiguousarray(one).view(np.uint8), np.ascontiguousarray(other).view(np.uint8)))


def _check_names(solution: Solution, artefact: Model, places: list[Place]) -> None:
    """As many tensors as were meant; `places` of the artefact raises for one that is missing."""
    path, known = artefact.checkpoint.path, set(places)
    for place in artefact.places():
        if place not in known:
            _wrong(path, f"{artefact.name(place)!r} was never meant to be written")
        known.discard(place)
    if known:
        _wrong(path, f"{artefact.name(min(known, key=str))!r} is missing")
    named = {artefact.name(place) for place in places}
    for name in sorted(artefact.present - named):
        if not any(part in name for part in artefact.names.ignorable):
            _wrong(path, f"{name!r} was never meant to be written")


def _check_scales(solution: Solution, artefact: Model, checkpoint: Checkpoint) -> None:
    """Scales of inputs and of the KV cache, which our own engine reads past."""
    meant = {place.name(artefact.names).removesuffix("weight") + "input_scale": scale
             for place, scale in solution.input_scales.items()}  # fmt: skip
    for index, (key, value) in solution.kv_scales.items():
        prefix = artefact.names.stems("qkv", index)[0].rpartition(".")[0]
        meant |= {f"{prefix}.k_scale": key, f"{prefix}.v_scale": value}
    found = _numbers(checkpoint.path)
    for name, scale in meant.items():
        if name not in found or not _same(np.array([scale], np.float32), found[name]):
            _wrong(checkpoint.path, f"{name!r} is not {scale:g}")
    if found.keys() - meant.keys():
        _wrong(checkpoint.path, f"{min(found.keys() - meant.keys())!r} was never meant to be written")


def _check_metadata(source: Checkpoint, artefact: Checkpoint) -> None:
    """The tokenizer does what the original's does, and a GGUF file's metadata is still there."""
    if source.format != "gguf":
        other = tokenizer_difference(Tokenizer.from_checkpoint(source), Tokenizer.from_checkpoint(artefact))
        if other is not None:
            _wrong(artefact.path, f"its tokenizer would {other}")
        return
    for key, value in copied_metadata(source).items():
        if not np.array_equal(np.asarray(value), np.asarray(artefact.config.get(key))):
            _wrong(artefact.path, f"the key {key!r} in it is another")


def _numbers(folder: Path) -> dict[str, NDArray[Any]]:
    """The single numbers beside a folder's weights."""
    from safetensors import safe_open

    found: dict[str, NDArray[Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
            scales = [name for name in names if name.endswith((".input_scale", ".k_scale", ".v_scale"))]
            found |= {name: tensors.get_tensor(name) for name in scales}
    return found


def _wrong(path: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is not what was meant: {what}.", "Write it again; if that fails too, check the disk and the memory."
    )
