"""A model that is all shapes: a config.json, with random weights of a chosen kind in place of its own.

Speed does not depend on what the weights say, so that it can be measured before anything is downloaded, or for an
architecture that nobody has trained. Such a MODEL is called `dummy:KIND:CONFIG`, or `dummy:KIND/LAYERS:CONFIG` for
its first layers only; `quant.dummy` knows the kinds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from miaotui.checkpoint.files import read_json
from miaotui.errors import CheckpointError, ModelNotFoundError, ResourceError, UsageError
from miaotui.model.families import hf
from miaotui.model.families.spec import Described, make_spec
from miaotui.model.shapes import shapes
from miaotui.model.spec import ModelSpec
from miaotui.model.tokenizer import Tokenizer
from miaotui.quant.dummy import Storage
from miaotui.quant.tensor import DenseTensor, Tensor

HEADROOM = 400 << 20
"""Bytes beside the weights: Python, a step's buffers, the largest matrix while it is prepared, a short context."""

_NAME = re.compile(r"dummy:(?P<kind>[\w-]+)(/(?P<layers>\d{1,4}))?:(?P<config>.+)", re.DOTALL)
_UNWANTED = ("quantization_config", "eos_token_id")
"""What a config.json says of weights that are not there, and where an answer ends: one of random weights never does."""


def dummy_name(config: str, kind: str, layers: int | None = None) -> str:
    """The MODEL that stands for this config.json (or a folder with one) with weights of this kind."""
    return f"dummy:{kind}{'' if layers is None else f'/{layers}'}:{config}"


def is_dummy(model: str) -> bool:
    return _NAME.fullmatch(model) is not None


def open_dummy(model: str) -> DummyCheckpoint:
    """The checkpoint that a `dummy:…` name describes.

    Raises ModelNotFoundError where there is no config.json, CheckpointError, UnsupportedModelError, UsageError.
    """
    match = _NAME.fullmatch(model)
    assert match is not None, "ask is_dummy first"
    path = Path(match["config"]).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelNotFoundError(
            f"There is no configuration at {str(path)[:200]!r}.", "Give a model's config.json, or a folder with one."
        )
    if path.suffix != ".json":
        raise UsageError(f"{path} is not a config.json.", "Shapes are read from a Hugging Face config.json.")
    layers = None if match["layers"] is None else int(match["layers"])
    return DummyCheckpoint(path, _without_weights(read_json(path), layers), Storage.parse(match["kind"]))


def _without_weights(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """The configuration without what only weights need; with `layers` layers, of those it has."""
    kept = {key: value for key, value in config.items() if key not in _UNWANTED}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        return {**kept, "text_config": _without_weights(text, layers)}
    count = kept.get("num_hidden_layers")
    if layers is None or not isinstance(count, int):
        return kept
    if not 1 <= layers <= count:
        raise UsageError(f"{layers} layers are wanted of a model of {count}.", f"Choose from 1 to {count}.")
    return {**kept, "num_hidden_layers": layers}


@dataclass(eq=False)
class DummyCheckpoint:
    """A Checkpoint without files: every tensor is made when it is asked for, and nothing is kept."""

    path: Path
    config: Mapping[str, Any]
    storage: Storage
    format: str = "safetensors"

    @cached_property
    def described(self) -> Described:
        return hf.describe(self.config)

    @cached_property
    def spec(self) -> ModelSpec:
        return make_spec(self.described, None)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(shapes(self.spec, self.described.names))

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> Tensor:
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(f"{self.path} describes no tensor {name!r:.100}.", "Give another config.json.")
        if len(shape) == 2:
            return self._storage(name).matrix(name, *shape)
        # norms neither scale nor shift, biases do nothing
        value = 1.0 - self.described.norm_offset if name.endswith(".weight") else 0.0
        return DenseTensor("float32", np.full(shape, value, np.float32))

    def asset(self, filename: str) -> Path | None:
        return None

    @cached_property
    def nbytes(self) -> int:
        matrices = ((name, shape) for name, shape in self.shapes.items() if len(shape) == 2)
        return sum(self._storage(name).nbytes(*shape) for name, shape in matrices)

    def fingerprint(self) -> str:
        content = json.dumps([self.config, self.storage.name], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _storage(self, name: str) -> Storage:
        """Routers are never quantised; embedding and head have a kind of their own."""
        names = self.described.names
        if name in (f"{names.embedding}.weight", f"{names.head}.weight"):
            return self.storage.tables
        if name.endswith(tuple(f".{stem}.weight" for stem in names.roles.get("router", ()))):
            return Storage.parse("bf16")
        return self.storage

    def tokenizer(self) -> Tokenizer:
        """One whose tokens are the numbers of the vocabulary; any other word is token 0."""
        import tokenizers

        vocabulary = {str(i): i for i in range(self.spec.vocab_size)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        return Tokenizer(backend)

    def check_memory(self, available: int, copies: int = 1) -> None:
        """Raise ResourceError when that many copies of the model do not fit in `available` bytes."""
        one = self.nbytes + HEADROOM
        if copies * one <= available:
            return
        weights = f"{self.nbytes / 1e9:.1f} GB of weights" + ("" if copies == 1 else f", {copies} times")
        smaller = "Choose a smaller --quantization, or fewer --layers."
        alone = "Leave out the regimes that load it a second time (start, load, peak-memory) with --regimes."
        raise ResourceError(
            f"{self.path} as {self.storage.name} needs {copies * one / 1e9:.1f} GB ({weights}),"
            f" but {available / 1e9:.1f} GB of memory are free.",
            alone if one <= available else smaller,
        )
