"""Checkpoints of a training, from which it goes on as if nothing had happened: each whole, or not there at all.

`000012/` holds `state.safetensors` (weights, the optimiser's moments, random numbers' states), `state.json` (where the
loader stands, the pace, what to compare the run with) and, once there is one, `best.safetensors`. Numbers go up; the
newest complete one counts. Never pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from miaotui.checkpoint.write import Stored, atomic_folder, write_json, write_safetensors
from miaotui.errors import CheckpointError, UsageError

KEPT = 2
"""Checkpoints that stay."""

_NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.float64: "F64"}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a training is at one moment. values: plain, for JSON. best: weights, None before any is best."""

    tensors: Tensors
    values: dict[str, Any]
    best: Tensors | None = None


@dataclass(eq=False)
class Store:
    """Checkpoints in a folder, of one run: `run` says which, and must be the same to go on from them."""

    folder: Path
    run: Mapping[str, Any]
    _best_at: tuple[Path, Any] | None = field(default=None, init=False)
    """The newest best.safetensors, and which step's it is: the next checkpoint shares the file."""

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, and remove all but the newest KEPT."""
        done = self._complete()
        path = self.folder / f"{int(done[-1].name) + 1 if done else 0:06d}"
        with atomic_folder(path) as building:
            _write(building / "state.safetensors", snapshot.tensors)
            if snapshot.best is not None:
                self._write_best(building / "best.safetensors", snapshot)
            write_json(building / "state.json", {"run": dict(self.run), **snapshot.values})
        if snapshot.best is not None:
            self._best_at = path / "best.safetensors", snapshot.values["pace"]["best_step"]
        for old in self._complete()[:-KEPT]:
            shutil.rmtree(old)
        return path

    def _write_best(self, path: Path, snapshot: Snapshot) -> None:
        if self._best_at is not None and self._best_at[1] == snapshot.values["pace"]["best_step"]:
            os.link(self._best_at[0], path)
        elif snapshot.best is not None:
            _write(path, snapshot.best)

    def load(self) -> Snapshot | None:
        """The newest checkpoint, None where there is none.

        Raises UsageError where it is another run's, CheckpointError where it cannot be read.
        """
        done = self._complete()
        if not done:
            return None
        try:
            values = json.loads((done[-1] / "state.json").read_text())
            tensors = _read(done[-1] / "state.safetensors")
            best = done[-1] / "best.safetensors"
            found = Snapshot(tensors, values, _read(best) if best.exists() else None)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{done[-1]} cannot be read: {error}.", f"Remove {done[-1]}.") from error
        theirs = values.pop("run")
        for key, value in self.run.items():
            if theirs.get(key) != value:
                raise UsageError(
                    f"{self.folder} holds the checkpoints of another run, whose {key} was {theirs.get(key)!r:.200}.",
                    "Ask for what it asked for, or remove that folder to start anew.",
                )
        return found

    def clear(self) -> None:
        """Remove all checkpoints."""
        for path in self._complete():
            shutil.rmtree(path)

    def _complete(self) -> list[Path]:
        """Oldest first. Folders that are being built have other names."""
        return sorted(path for path in self.folder.glob("[0-9]" * 6) if path.is_dir())


def _write(path: Path, tensors: Tensors) -> None:
    stored = [Stored(name, _NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()]
    write_safetensors(path, stored, lambda name: tensors[name].detach().cpu().contiguous().numpy())


def _read(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


# -- optimisers ------------------------------------------------------------------------------------------------
def optimiser_tensors(optimiser: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> Tensors:
    """An optimiser's moments and counters, by the names of its parameters."""
    found = {}
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            found[f"{names[parameter]}/{key}"] = torch.as_tensor(value)
    return found


def restore_optimiser(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], tensors: Tensors
) -> None:
    """Put back what `optimiser_tensors` gave; nothing where nothing was."""
    optimiser.state.clear()
    for name, value in tensors.items():
        stem, _, key = name.rpartition("/")
        parameter = parameters[stem]
        like = value.clone() if key == "step" else value.clone().to(parameter.device)
        optimiser.state[parameter][key] = like
