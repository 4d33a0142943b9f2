"""A GGUF file of a solution: what llama.cpp and its kin load, and we ourselves.

Coded weights become Q4_0, Q4_1 or Q8_0 blocks, everything else stays what it is (norms, biases and routers as float32,
as llama.cpp wants them). A Hugging Face folder's configuration and tokenizer become metadata; a GGUF file's own is
copied. The recipe stands in the metadata too, under `miaotui.recipe`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.write import Blocked
from miaotui.checkpoint.write import write_gguf as write_file
from miaotui.compress.places import NORMS, Model, all_places
from miaotui.compress.recipe import GGUF_SCHEMES, scheme_name
from miaotui.compress.types import KEPT, Fp8Tensor, KvScheme, LinearScheme, Place, Solution
from miaotui.compress.writing.gguf_config import GGUFTarget, Preview, check_spec, gguf_target
from miaotui.compress.writing.gguf_text import check_tokenizer, tokenizer_metadata
from miaotui.errors import UsageError
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.model.weights import halves
from miaotui.quant import pack
from miaotui.quant.rounding import bfloat16_bits, to_scale_type
from miaotui.quant.tensor import BlockTensor, DenseTensor, GroupedTensor, Tensor

RECIPE = "miaotui.recipe"

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12,
              "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32}  # fmt: skip
"""llama.cpp's number for a file, by the kind that most of its weights have."""

_DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STACKS = {"expert_in": "experts_in", "expert_out": "experts_out"}


def write_gguf(solution: Solution, out: Path, *, recipe_yaml: str) -> None:
    """Write a solution as one file, which takes `out`'s place when it is whole.

    Memory: about two of the model's largest tensors; of all experts of one layer where it has them. Raises what
    `check_gguf` does, before anything is written.
    """
    target = check_gguf(solution.source, solution.spec, solution.names, solution.schemes, solution.kv_scheme)
    parts = _Parts(solution, target)
    blocked = [Blocked(name, "F32", tensor.shape) for name, tensor in target.settings.items()]
    blocked += [parts.announce(name, places) for name, places in parts.stacks.items()]
    metadata = dict(target.metadata) | {
        "general.file_type": _file_type(blocked),
        "general.quantization_version": 2,
        RECIPE: recipe_yaml,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, metadata, blocked, parts.load)


# -- what can be said, before anything is computed --------------------------------------------------------------
def check_gguf(
    source: Checkpoint,
    spec: ModelSpec,
    names: Names,
    schemes: Mapping[Place, LinearScheme],
    kv_scheme: KvScheme = "none",
) -> GGUFTarget:
    """The layout and the metadata of a file with these schemes; nothing of it needs the solution.

    Raises UsageError for a scheme that GGUF has no blocks for, and UnsupportedModelError for a model or a tokenizer
    that it cannot describe: what would be written is read as a file would be, and compared with the original.
    """
    if kv_scheme != "none":
        raise UsageError(
            f"GGUF has no place for the scales of a {kv_scheme} KV cache.",
            "Leave kv_cache at none (llama.cpp chooses a cache's type when it runs), or write compressed-tensors.",
        )
    target = gguf_target(source, spec, names)
    original = Model(source, spec, names)
    places = list(original.places())
    _check_schemes(original, target.names, schemes)
    if source.format != "gguf":
        arch = str(target.metadata["general.architecture"])
        text = tokenizer_metadata(source, arch, spec.vocab_size)
        target = replace(target, metadata={**target.metadata, **text})
    embedding = {f"{target.names.embedding}.weight": original.stored(Place("embedding"))}
    tensors = [*target.settings, *stacks(target.names, places)]
    preview = Preview(target.metadata, tensors, {**target.settings, **embedding})
    check_spec(spec, preview)
    if source.format != "gguf":
        check_tokenizer(source, preview)
    return target


def _check_schemes(original: Model, names: Names, schemes: Mapping[Place, LinearScheme]) -> None:
    """Every scheme has a kind of blocks, every row is whole blocks, and a layer's experts share their scheme."""
    stacked: dict[str, LinearScheme] = {}
    for place, scheme in schemes.items():
        stack = _name(names, place)
        if stacked.setdefault(stack, scheme) != scheme:
            _refuse(f"The experts in {stack} are one tensor in GGUF but have different schemes", "one scheme")
        if scheme.kept:
            continue
        name = place.name(original.names).removesuffix(".weight")
        kind = gguf_kind(scheme)
        if kind is None:
            why = f" with {scheme.weights.scale_type} scales" if scheme.weights is not None else ""
            _refuse(f"GGUF has no blocks for {scheme_name(scheme)}{why}, which {name} is to have", "one of these")
        tied = place.role == "head" and original.spec.tied_head
        width = original.stored(Place("embedding") if tied else place).shape[-1]
        if width % pack.KINDS[kind].block_size:
            _refuse(f"Rows of {name} have {width} weights, not a multiple of {pack.KINDS[kind].block_size}", "keep")


def _refuse(cause: str, give: str) -> NoReturn:
    known = ", ".join(f"{name} ({meaning})" for name, meaning in GGUF_SCHEMES.items())
    what = {
        "one scheme": "Give them one scheme",
        "one of these": f"Choose {known}, with float16 scales and inputs as they are",
        "keep": "Keep it with an override (scheme: keep)",
    }[give]
    raise UsageError(f"{cause}.", f"{what}, or write a folder with the format compressed-tensors.")


def gguf_kind(scheme: LinearScheme) -> str | None:
    """GGUF's kind of blocks for a scheme, None where it has none."""
    if scheme.inputs != "none":
        return None
    kinds = ("Q4_0", "Q4_1", "Q8_0")
    return next((kind for kind in kinds if pack.KINDS[kind].scheme == scheme.weights), None)


# -- names and order --------------------------------------------------------------------------------------------
def stacks(names: Names, places: Iterable[Place]) -> dict[str, list[Place]]:
    """The file's tensors, each with what lies in it: one place, or all experts of a layer."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(_name(names, place), []).append(place)
    return found


def _name(names: Names, place: Place) -> str:
    if place.expert is None:
        return place.name(names)
    return names.stems(_STACKS[place.role], place.layer)[place.part] + ".weight"


def _file_order(spec: ModelSpec, names: Names, place: Place) -> NDArray[np.int64] | None:
    """Which effective row is each row of the file, where llama.cpp's converter permutes q and k; else None."""
    if not names.interleaved or place.role != "qkv" or place.part == 2:
        return None
    attention = spec.layers[place.layer].attention
    return np.argsort(halves(attention.heads if place.part == 0 else attention.kv_heads, attention.head_dim))


# -- tensors ----------------------------------------------------------------------------------------------------
class _Parts:
    """What each tensor of the file holds."""

    def __init__(self, solution: Solution, target: GGUFTarget) -> None:
        self.solution = solution
        self.target = target
        self.original = Model(solution.source, solution.spec, solution.names)
        self.changed = frozenset(solution.places())
        self.stacks = stacks(target.names, all_places(solution))

    def announce(self, name: str, places: Sequence[Place]) -> Blocked:
        """A tensor's kind and shape. Blocks are not computed for it; dense tensors are loaded."""
        first = places[0]
        kind = gguf_kind(self.solution.schemes.get(first, KEPT))
        if kind is None:
            tensor = self._kept(first)
            kind = tensor.kind if isinstance(tensor, BlockTensor) else _DENSE[tensor.type]
            shape = tensor.shape
        else:
            tied = first.role == "head" and self.solution.spec.tied_head
            shape = self.original.stored(Place("embedding") if tied else first).shape
        return Blocked(name, kind, shape if first.expert is None else (len(places), *shape))

    def load(self, name: str) -> DenseTensor | BlockTensor:
        if name in self.target.settings:
            return self.target.settings[name]
        parts = [self._part(place) for place in self.stacks[name]]
        if self.stacks[name][0].expert is None:
            return parts[0]
        return _stack(parts)

    def _part(self, place: Place) -> DenseTensor | BlockTensor:
        """One place, with its rows in the file's order."""
        kind = gguf_kind(self.solution.schemes.get(place, KEPT))
        tensor = self._kept(place) if kind is None else _blocks(kind, self.solution.tensor(place), place)
        order = _file_order(self.solution.spec, self.target.names, place)
        return tensor if order is None else tensor.rows(order)

    def _kept(self, place: Place) -> DenseTensor | BlockTensor:
        """What is not coded: numbers in the type that they have, a GGUF file's blocks as they are."""
        tensor = self.solution.tensor(place) if place in self.changed else self.original.values(place)
        assert not isinstance(tensor, Fp8Tensor), f"{place} is fp8 and its scheme does not say so"
        if isinstance(tensor, BlockTensor):
            return tensor
        if place.role in NORMS or place.role == "router" or place.bias:
            return DenseTensor("float32", tensor.dense32())
        if not isinstance(tensor, DenseTensor):
            return DenseTensor("bfloat16", bfloat16_bits(tensor.dense32()))
        return tensor if tensor.type != "float32" else _narrowest(tensor)


def _stack(parts: Sequence[DenseTensor | BlockTensor]) -> DenseTensor | BlockTensor:
    """Matrices of one kind `[out, in]` as `[n, out, in]`."""
    first = parts[0]
    data: NDArray[Any] = np.stack([part.data for part in parts])
    if isinstance(first, BlockTensor):
        return BlockTensor(first.kind, data, (len(parts), *first.shape))
    return DenseTensor(first.type, data)


def _narrowest(tensor: DenseTensor) -> DenseTensor:
    """As bfloat16 where that holds it exactly."""
    values = tensor.dense32()
    if np.array_equal(to_scale_type(values, "bfloat16"), values):
        return DenseTensor("bfloat16", bfloat16_bits(values))
    return tensor


def _blocks(kind: str, coded: Tensor | Fp8Tensor, place: Place) -> BlockTensor:
    assert isinstance(coded, GroupedTensor), f"{place} is not what its scheme says"
    for numbers in (coded.scale, coded.minimum):
        exact = numbers is None or np.array_equal(to_scale_type(numbers, "float16"), numbers)
        assert exact, f"{place} has scales or minima that are no float16"
    return pack.blocks(kind, replace(coded, scheme=pack.KINDS[kind].scheme))


def _file_type(blocked: Sequence[Blocked]) -> int:
    """By the kind of most matrices; the first of equals."""
    counts = Counter(tensor.kind for tensor in blocked if len(tensor.shape) > 1)
    return FILE_TYPES[counts.most_common(1)[0][0]]
