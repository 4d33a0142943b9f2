"""Tensors that wait on disk until all are known and the artefact can be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from miaotui.compress.writing.dense import Floats, as_type
from miaotui.errors import CheckpointError
from miaotui.quant.tensor import DenseTensor, DenseType


@dataclass(eq=False)
class Shelf:
    """One file a tensor, in the type that it will be stored as."""

    folder: Path
    _kinds: dict[str, tuple[Path, DenseType]] = field(default_factory=dict)

    def put(self, name: str, values: Floats, kind: DenseType) -> None:
        """Raises CheckpointError for numbers that are not finite."""
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{name!r:.100} became numbers that are not finite.", "Check the model, or calibrate on more text."
            )
        path = self.folder / f"{len(self._kinds)}.npy"
        np.save(path, as_type(values, kind))
        self._kinds[name] = path, kind

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    def get(self, name: str) -> DenseTensor:
        """A view of the file."""
        path, kind = self._kinds[name]
        return DenseTensor(kind, np.load(path, mmap_mode="r"))


@contextmanager
def shelf_beside(out: Path) -> Iterator[Shelf]:
    """A shelf on the disk where the artefact will be; it goes when the block ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.shelf.") as folder:
        yield Shelf(Path(folder))
