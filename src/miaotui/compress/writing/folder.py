"""A compressed-tensors folder: what vLLM, transformers and we ourselves load.

The layouts are compressed-tensors' own: pack-quantized for weights alone, int-quantized where the inputs are coded too
(w8a8, w4a8), float-quantized for fp8. `sparsity_config` is left out, which vLLM refuses even when it is dense.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.write import Stored, write_json, write_sharded
from miaotui.compress.places import NORMS, Model, all_places
from miaotui.compress.types import Fp8Tensor, LinearScheme, Place, Solution
from miaotui.compress.writing.folder_config import Target, folder_config, target_of
from miaotui.model.chat import find_chat_templates
from miaotui.model.spec import ModelSpec
from miaotui.model.tokenizer import Tokenizer
from miaotui.quant import pack
from miaotui.quant.rounding import bfloat16_bits, to_scale_type
from miaotui.quant.scheme import ScaleType
from miaotui.quant.tensor import DenseTensor, GroupedTensor

ASSETS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
"""Files beside the original's weights that go with them."""

_STORED: dict[ScaleType, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def write_folder(solution: Solution, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a solution into an empty folder.

    Memory: about two of the model's largest tensors. Raises UnsupportedModelError or UsageError for what the format,
    or the engines that read it, cannot hold, before anything is written.
    """
    target = target_of(solution)
    config = folder_config(solution, target)
    pieces = list(_Parts(solution, target).pieces())
    loads = {piece.stored.name: piece.load for piece in pieces}
    write_sharded(folder, [piece.stored for piece in pieces], lambda name: loads[name]())
    write_json(folder / "config.json", config)
    write_assets(solution.source, solution.spec, folder)


@dataclass(frozen=True, eq=False)
class _Piece:
    """One stored tensor, loaded when it is written (bfloat16 and e4m3 as their bits)."""

    stored: Stored
    load: Callable[[], NDArray[Any]]


class _Parts:
    """What each place of a solution is stored as."""

    def __init__(self, solution: Solution, target: Target) -> None:
        self.solution = solution
        self.target = target
        self.original = Model(solution.source, solution.spec, solution.names)
        self.changed = frozenset(solution.places())

    def pieces(self) -> Iterator[_Piece]:
        """Every tensor of the folder. Integer codes are not loaded to be announced, dense tensors are."""
        solution, names = self.solution, self.target.names
        for place in all_places(solution):
            scheme = solution.schemes.get(place)
            if scheme is None or scheme.kept:
                yield self._dense(place)
            elif scheme.weights is None:
                yield from self._floats(place)
            else:
                yield from self._integers(place, scheme)
        for place, scale in sorted(solution.input_scales.items()):
            yield _number(self._module(place) + "input_scale", scale)
        for index, scales in sorted(solution.kv_scales.items()):
            prefix = names.stems("qkv", index)[0].rpartition(".")[0]
            for what, scale in zip(("k_scale", "v_scale"), scales, strict=True):
                yield _number(f"{prefix}.{what}", scale)

    def _module(self, place: Place) -> str:
        return place.name(self.target.names).removesuffix("weight")

    # -- integers ----------------------------------------------------------------------------------------
    def _integers(self, place: Place, scheme: LinearScheme) -> Iterator[_Piece]:
        """Words of codes for weights alone, one int8 a code where the inputs are coded too."""
        weights, module = scheme.weights, self._module(place)
        assert weights is not None
        out, width = self._shape(place)
        groups, kind = weights.groups(width), weights.scale_type
        yield _Piece(
            Stored(module + "weight_scale", _STORED[kind], (out, groups)),
            lambda: _as_type(self._codes(place).scale, kind),
        )
        if scheme.inputs != "none":
            yield _Piece(Stored(module + "weight", "I8", (out, width)), lambda: _signed(self._codes(place)))
            return
        words = Stored(module + "weight_packed", "I32", (out, -(-width * weights.bits // 32)))
        yield _Piece(words, lambda: pack.compressed_words(self._codes(place))[0])
        if not weights.symmetric:
            points = Stored(module + "weight_zero_point", "I32", (-(-out * weights.bits // 32), groups))
            yield _Piece(points, partial(self._zero_points, place))
        yield _Piece(Stored(module + "weight_shape", "I64", (2,)), lambda: np.array([out, width], np.int64))

    def _shape(self, place: Place) -> tuple[int, ...]:
        tied = place.role == "head" and self.solution.spec.tied_head
        return self.original.stored(Place("embedding") if tied else place).shape

    def _codes(self, place: Place) -> GroupedTensor:
        coded = self.solution.tensor(place)
        assert isinstance(coded, GroupedTensor), f"{place} is not what its scheme says"
        return coded

    def _zero_points(self, place: Place) -> NDArray[Any]:
        zeros = pack.compressed_words(self._codes(place))[1]
        assert zeros is not None, f"{place} has no zero points"
        return zeros

    # -- floats ------------------------------------------------------------------------------------------
    def _floats(self, place: Place) -> Iterator[_Piece]:
        """e4m3 and a scale for each row, in the model's own type where that holds it."""
        module = self._module(place)
        coded = self.solution.tensor(place)
        assert isinstance(coded, Fp8Tensor), f"{place} is not what its scheme says"
        data = Stored(module + "weight", "F8_E4M3", coded.shape)
        scale = _narrowest(coded.scale, self.target.type)

        def load() -> NDArray[Any]:
            again = self.solution.tensor(place)
            assert isinstance(again, Fp8Tensor)
            return again.data

        yield _Piece(data, load)
        yield _Piece(Stored(module + "weight_scale", _STORED[scale.type], scale.shape), lambda: scale.data)

    def _dense(self, place: Place) -> _Piece:
        def load() -> DenseTensor:
            return kept_tensor(self.solution, self.original, self.target, self.changed, place)

        tensor = load()
        stored = Stored(place.name(self.target.names), _STORED[tensor.type], tensor.shape)
        return _Piece(stored, lambda: load().data)


def kept_tensor(
    solution: Solution, original: Model, target: Target, changed: frozenset[Place], place: Place
) -> DenseTensor:
    """The dense tensor to store at a place that is not coded, any norm offset taken off again.

    float32 is stored in the model's own type where that loses nothing. What the original has in codes of its own (a
    GGUF file's blocks) is rounded to that type.
    """
    if place in changed:
        tensor, offset = solution.tensor(place), target.norm_offset
    else:
        tensor, offset = original.stored(place), target.norm_offset - solution.spec.norm_offset
    assert not isinstance(tensor, Fp8Tensor), f"{place} is fp8 and its scheme does not say so"
    if place.role in NORMS and not place.bias and offset:
        return _narrowest(tensor.dense32() - np.float32(offset), target.type)
    if not isinstance(tensor, DenseTensor):
        return _dense(tensor.dense32(), target.type)
    return tensor if tensor.type != "float32" else _narrowest(tensor.dense32(), target.type)


def _number(name: str, value: float) -> _Piece:
    return _Piece(Stored(name, "F32", (1,)), lambda: np.array([value], np.float32))


def _signed(coded: GroupedTensor) -> NDArray[np.int8]:
    """Symmetric codes as compressed-tensors' int8: 2^(bits−1) taken off."""
    assert coded.scheme.symmetric, "where inputs are coded, weights are symmetric"
    return (coded.codes.astype(np.int16) - coded.scheme.zero).astype(np.int8)


def _narrowest(values: NDArray[np.float32], kind: ScaleType) -> DenseTensor:
    """As this type where that holds them exactly, else as float32."""
    return _dense(values, kind if np.array_equal(to_scale_type(values, kind), values) else "float32")


def _dense(values: NDArray[np.float32], kind: ScaleType) -> DenseTensor:
    return DenseTensor(kind, _as_type(values, kind))


def _as_type(values: NDArray[np.float32], kind: ScaleType) -> NDArray[Any]:
    if kind == "bfloat16":
        return bfloat16_bits(values)
    return to_scale_type(values, kind).astype(np.float16 if kind == "float16" else np.float32)


# -- tokenizer -----------------------------------------------------------------------------------------------------
def copy_assets(source: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and licence."""
    for name in ASSETS:
        asset = source.asset(name)
        if asset is not None:
            shutil.copyfile(asset, folder / name)
    extra = source.path / "additional_chat_templates"
    if extra.is_dir():
        shutil.copytree(extra, folder / extra.name)


def write_assets(source: Checkpoint, spec: ModelSpec, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and licence; made from the metadata where it was a GGUF file."""
    if source.format != "gguf":
        copy_assets(source, folder)
        return
    tokenizer = Tokenizer.from_checkpoint(source)
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": spec.max_position}
    write_json(folder / "tokenizer_config.json", config)
    for name, text in find_chat_templates(source).items():
        where = folder / "chat_template.jinja"
        if name != "default":
            where = folder / "additional_chat_templates" / f"{name}.jinja"
            where.parent.mkdir(exist_ok=True)
        where.write_text(text, encoding="utf-8")
    ends = {"eos_token_id": list(tokenizer.eos_ids), "bos_token_id": tokenizer.bos_id}
    write_json(folder / "generation_config.json", {k: v for k, v in ends.items() if v not in (None, [])})
