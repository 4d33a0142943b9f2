"""A trained model as a folder of plain numbers, in the layout of its family on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.write import Stored, write_json, write_sharded
from miaotui.compress.writing.dense import STORED, as_type, plain_config
from miaotui.compress.writing.folder import write_assets
from miaotui.compress.writing.folder_config import config_of_gguf
from miaotui.model.spec import ModelSpec
from miaotui.quant.tensor import DenseType


def dense_config(source: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a model's weights as plain numbers.

    Raises UnsupportedModelError where a GGUF file says what config.json has no word for.
    """
    if source.format == "gguf":
        return config_of_gguf(source, spec)
    return plain_config(source)


def write_model(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], NDArray[np.float32]],
    kind: DenseType,
    config: Mapping[str, Any],
    source: Checkpoint,
    spec: ModelSpec,
) -> None:
    """Weights of these names and shapes, configuration, and the source's text files, into an empty folder."""
    tensors = [Stored(name, STORED[kind], shape) for name, shape in shapes.items()]
    write_sharded(folder, tensors, lambda name: as_type(load(name), kind))
    write_json(folder / "config.json", _typed(config, kind))
    write_assets(source, spec, folder)


def _typed(config: Mapping[str, Any], kind: DenseType) -> dict[str, Any]:
    """The configuration with the weights' type, by either of its names."""
    typed = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    inner = typed.get("text_config")
    if isinstance(inner, Mapping):
        typed["text_config"] = _typed(inner, kind)
    return typed | {"dtype": kind}
