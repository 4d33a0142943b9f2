"""From a checkpoint's own configuration to a ModelSpec, for every family that is supported.

- `table.py`: the families, as data: their switches, names, and the configuration keys that are understood.
- `hf.py`, `gguf.py`: read `config.json`, or GGUF metadata, into one vocabulary (transformers'), refusing what they
  don't understand.
- `spec.py`: make a ModelSpec of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miaotui.checkpoint.base import Checkpoint
from miaotui.model.families import gguf, hf
from miaotui.model.families.spec import Described, make_spec
from miaotui.model.families.table import FAMILIES, Family
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec

__all__ = ["FAMILIES", "Described", "Family", "describe", "read_spec", "spec_of_config"]


def describe(checkpoint: Checkpoint) -> Described:
    """The family of a checkpoint, its tensors' names and its settings.

    Raises UnsupportedModelError for an architecture or a setting that is not understood, CheckpointError for a
    configuration that is incomplete or impossible.
    """
    return gguf.describe(checkpoint) if checkpoint.format == "gguf" else hf.describe(checkpoint.config)


def spec_of_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec that a config.json alone describes, for its own context. Raises what `describe` does."""
    return make_spec(hf.describe(config), None)


def read_spec(checkpoint: Checkpoint, max_model_len: int | None = None) -> tuple[ModelSpec, Names]:
    """The spec of a checkpoint and the names of its tensors.

    max_model_len: the longest sequence it is to serve, which scaled rotary embeddings depend on (see `model.rope`);
    None: what the configuration promises. `spec.max_position` never exceeds what the model's scaling reaches.
    """
    described = describe(checkpoint)
    return make_spec(described, max_model_len), described.names
