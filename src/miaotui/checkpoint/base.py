"""The protocol behind which every file format stands: names to tensors, streamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from miaotui.quant.tensor import Tensor


class Checkpoint(Protocol):
    """An opened model: its configuration, its tensors by name, its text assets.

    Opening reads headers only. `tensor(name)` returns a view of the mapped file where the format allows it and
    never keeps a reference, so that memory is bounded by the largest tensor (plus the page cache).
    """

    path: Path
    format: str
    """`safetensors` or `gguf`."""

    config: Mapping[str, Any]
    """config.json's content; for GGUF the metadata key-values (arrays of strings as lists)."""

    def names(self) -> list[str]:
        """Tensor names as the file spells them."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, quantised layouts (qweight + scales + …) already joined under `….weight`.

        Raises CheckpointError when it is absent or its bytes are not all there.
        """
        ...

    def asset(self, filename: str) -> Path | None:
        """A file that lies beside the weights (`tokenizer.json`, `chat_template.jinja`, …), if it is there."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the files do (names, sizes, modification times and header bytes)."""
        ...
