"""A folder of which only the text files count: the tokenizer for a model that has no weights yet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miaotui.checkpoint.files import read_json
from miaotui.errors import CheckpointError, ModelNotFoundError
from miaotui.quant.tensor import Tensor


class TextFiles:
    """A Checkpoint without weights."""

    format = "safetensors"
    nbytes = 0

    def __init__(self, path: Path) -> None:
        """Raises ModelNotFoundError where the folder has no tokenizer.json."""
        self.path = path
        self.config: Mapping[str, Any] = {}
        if self.asset("tokenizer.json") is None:
            raise ModelNotFoundError(f"{path} holds no tokenizer.json.", "Give a folder with one.")
        if self.asset("config.json") is not None:
            self.config = read_json(path / "config.json")

    def names(self) -> list[str]:
        return []

    def tensor(self, name: str) -> Tensor:
        raise CheckpointError(f"{self.path} was opened for its text files, not for {name!r:.100}.", "Open the model.")

    def asset(self, filename: str) -> Path | None:
        found = self.path / filename
        return found if found.is_file() else None

    def fingerprint(self) -> str:
        content = (self.path / "tokenizer.json").read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]
