"""Single weights of all linears set to 0, layer by layer, by magnitude, Wanda or SparseGPT."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from miaotui.compress.layers import read_layer
from miaotui.compress.methods.magnitude import magnitude
from miaotui.compress.methods.sparsegpt import shared_factor, sparsegpt
from miaotui.compress.methods.sparsity import Sparsity
from miaotui.compress.methods.wanda import wanda
from miaotui.compress.places import Model
from miaotui.compress.pruning.importance import Importance
from miaotui.compress.pruning.known import calibrated
from miaotui.compress.pruning.run import Method, Pruned, PruneSettings, Tell
from miaotui.compress.pruning.shelf import Shelf
from miaotui.compress.types import InputStatistics, LinearGroup
from miaotui.compress.writing import dense


def make_sparse(model: Model, settings: PruneSettings, shelf: Shelf, tell: Tell) -> Pruned:
    """Prune every linear of every layer; embedding, head, norms and routers stay as they are."""
    sparsity = settings.sparsity
    assert sparsity is not None
    made = _Sparse(model, sparsity, settings.method, shelf)
    made.check()
    layers = len(model.spec.layers)
    blind = settings.method == "magnitude"
    found = None if blind else calibrated(model, settings.calibration, settings.cache, half(tell, 0))
    with torch.no_grad():
        for index in range(layers):
            made.layer(index, {} if found is None else found.statistics.layer(index).inputs)
            half(tell, 1)(index + 1, layers)
    return made.pruned(settings, None if found is None else found.text.report())


def half(tell: Tell, which: int) -> Tell:
    """Progress of the first or the second of two equal parts."""
    return lambda done, total: tell(done + which * total, 2 * total)


class _Sparse:
    def __init__(self, model: Model, sparsity: Sparsity, method: Method, shelf: Shelf) -> None:
        self.model = model
        self.sparsity = sparsity
        self.method = method
        self.shelf = shelf
        self.zeros = 0
        self.unseen: list[str] = []
        self.errors: dict[tuple[int, str], float] = {}
        self.sparse: dict[str, str] = {}

    def check(self) -> None:
        """Raises UsageError, before anything is run, where rows are not made of whole groups."""
        layer = read_layer(self.model, 0)
        for group in layer.groups.values():
            self.sparsity.check(group.weights[0].shape[1])

    def layer(self, index: int, statistics: Mapping[str, InputStatistics]) -> None:
        layer = read_layer(self.model, index)
        for key, group in layer.groups.items():
            found = statistics.get(key)
            pruned = self._group(group, found)
            if found is not None:
                self.errors[index, key] = relative_error(group.weights, pruned, found.moment)
            elif self.method != "magnitude":
                self.unseen.append(f"{key} of layer {index}")
            for place, weight in zip(group.places, pruned, strict=True):
                name = self.model.name(place)
                kind = dense.dense_tensor(self.model, name).type
                self.shelf.put(name, weight.numpy(), kind)
                self.sparse[name] = "unstructured" if self.sparsity.of is None else str(self.sparsity)
                self.zeros += int((dense.as_type(weight.numpy(), kind) == 0).sum())

    def _group(self, group: LinearGroup, found: InputStatistics | None) -> list[torch.Tensor]:
        """Experts that no token of the calibration reached go by magnitude."""
        if found is None:
            return [magnitude(weight, self.sparsity) for weight in group.weights]
        if self.method == "wanda":
            return [wanda(weight, self.sparsity, found.moment) for weight in group.weights]
        shared = shared_factor(found.moment)
        return [sparsegpt(weight, self.sparsity, shared) for weight in group.weights]

    def pruned(self, settings: PruneSettings, report: Mapping[str, object] | None) -> Pruned:
        tensors = []
        for name, shape in dense.dense_shapes(self.model).items():
            original = dense.dense_tensor(self.model, name)
            load = partial(_load, self.shelf, name) if name in self.shelf else original.dense32
            tensors.append(dense.Written(name, original.type, shape, load))
        importance = Importance()
        importance.errors = self.errors
        error = sum(self.errors.values()) / len(self.errors) if self.errors else None
        notes = list(_notes(self, settings))
        assert self.sparse.keys() <= {tensor.name for tensor in tensors}, "a linear that nobody writes"
        kept = self.sparse if settings.storage == "bitmask" else {}
        return Pruned(
            tensors, dense.plain_config(self.model.checkpoint), importance, kept, self.zeros,
            error=error, notes=notes, calibration=report,
        )  # fmt: skip


def _load(shelf: Shelf, name: str) -> dense.Floats:
    return shelf.get(name).dense32()


def relative_error(weights: list[torch.Tensor], pruned: list[torch.Tensor], moment: torch.Tensor) -> float:
    """‖ΔW·X‖² / ‖W·X‖² of matrices with the same inputs X, by their XᵀX."""
    weight, change = torch.cat(weights), torch.cat(pruned) - torch.cat(weights)
    lost, had = (float(((part @ moment) * part).sum(dtype=torch.float64)) for part in (change, weight))
    return lost / had if had > 0 else 0.0


def _notes(made: _Sparse, settings: PruneSettings) -> list[str]:
    """What a reader should not have to find out."""
    notes = [
        "Zeros save bytes on disk and no time: they are multiplied like other numbers, and take their place in memory."
        " For speed, cut blocks, heads or channels, or quantise."
    ]
    if settings.storage == "bitmask":
        notes.append(
            "The zeros are left out of the file (compressed-tensors' sparse-bitmask). Miaotui reads that, and"
            " transformers with compressed-tensors up to 0.12; for other engines write --storage dense."
        )
    else:
        notes.append("Every zero is stored, so that the file is as large as it was; any runtime loads it.")
    if made.unseen:
        notes.append(
            f"No token of the calibration reached {', '.join(made.unseen[:4])}{' and more' * (len(made.unseen) > 4)}:"
            " pruned by magnitude."
        )
    return notes
