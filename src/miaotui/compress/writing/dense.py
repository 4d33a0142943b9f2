"""Folders of plain numbers: what merging and pruning read, and what they write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.layouts import SPARSE, sparsity_format
from miaotui.checkpoint.write import Stored, write_json, write_sharded
from miaotui.compress.places import Model
from miaotui.compress.writing.folder import copy_assets
from miaotui.errors import CheckpointError, UsageError
from miaotui.model.families import read_spec
from miaotui.model.shapes import shapes
from miaotui.quant.rounding import bfloat16_bits
from miaotui.quant.tensor import DenseTensor, DenseType

STORED: Mapping[DenseType, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Written:
    """One tensor of a folder to be: how it is stored, and its values as float32."""

    name: str
    type: DenseType
    shape: tuple[int, ...]
    load: Callable[[], Floats]


def open_dense(model: str, doing: str) -> Model:
    """A model in safetensors whose weights are plain numbers; `doing` is what is to be done (`merge`).

    Raises UsageError for one that is quantised or a GGUF file.
    """
    checkpoint = open_checkpoint(resolve(model))
    remedy = f"Give the original it was made from, as safetensors, and quantise what you {doing} afterwards."
    if checkpoint.format == "gguf":
        raise UsageError(f"{model} is a GGUF file, whose weights are coded.", remedy)
    if _quantised(checkpoint):
        raise UsageError(f"The weights of {model} are quantised.", remedy)
    return Model(checkpoint, *read_spec(checkpoint))


def _quantised(checkpoint: Checkpoint) -> bool:
    """Whether weights are codes; sparse ones, in compressed-tensors' bitmasks, are not."""
    if checkpoint.asset("quantize_config.json"):
        return True
    config = checkpoint.config.get("quantization_config")
    return bool(config) and not (isinstance(config, Mapping) and sparsity_format(config) == SPARSE)


def dense_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The tensors that the model needs, by name, with their shapes as they are in the file.

    Raises CheckpointError for one that is missing.
    """
    wanted = [name for name, _ in shapes(model.spec, model.names)]
    missing = [name for name in wanted if name not in model.present]
    if missing:
        raise CheckpointError(
            f"{model.checkpoint.path} lacks {', '.join(map(repr, missing[:8]))}{' and more' * (len(missing) > 8)}.",
            "Download it again.",
        )
    return {name: model.checkpoint.tensor(name).shape for name in wanted}


def dense_tensor(model: Model, name: str) -> DenseTensor:
    """A tensor as its file has it."""
    tensor = model.checkpoint.tensor(name)
    if not isinstance(tensor, DenseTensor):
        raise UsageError(f"The tensor {name!r:.100} of {model.checkpoint.path} is quantised.", "Give the original.")
    return tensor


def write_dense(folder: Path, tensors: Sequence[Written], config: Mapping[str, Any], source: Checkpoint) -> None:
    """Weights, configuration, and the text files that lie beside the source's weights.

    Memory: one tensor at a time, with what loading it takes.
    """
    by_name = {tensor.name: tensor for tensor in tensors}

    def load(name: str) -> NDArray[Any]:
        return as_type(by_name[name].load(), by_name[name].type)

    write_sharded(folder, [Stored(tensor.name, STORED[tensor.type], tensor.shape) for tensor in tensors], load)
    write_json(folder / "config.json", config)
    copy_assets(source, folder)


def plain_config(source: Checkpoint, **changes: Any) -> dict[str, Any]:
    """The source's config.json without what says how its weights were coded, with changes.

    A model whose text part lies in a `text_config` is changed there.
    """
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config["text_config"] = {**inner, **changes}
        return config
    return {**config, **changes}


def as_type(values: Floats, kind: DenseType) -> NDArray[Any]:
    """Rounded to nearest; beyond float16's range, its largest."""
    if kind == "bfloat16":
        return bfloat16_bits(values)
    if kind == "float16":
        largest = np.float32(np.finfo(np.float16).max)
        return np.clip(values, -largest, largest).astype(np.float16)
    return values


def differences(these: Mapping[str, Any], others: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, with both; None stands for one that is missing."""
    for key in [*these, *(key for key in others if key not in these)]:
        if these.get(key) != others.get(key):
            yield key, these.get(key), others.get(key)
