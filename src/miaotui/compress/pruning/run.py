"""`miaotui prune`: single weights set to 0, or whole blocks, heads, channels and hidden dimensions cut out.

    prune(model: str, settings: PruneSettings, out: Path, *, tell: Tell) -> PruneReport

Zeros (`prune_sparse`) leave the model's shape as it is; cutting (`prune_cut`) leaves a smaller dense model.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.write import atomic_folder
from miaotui.compress.methods.sparsity import Sparsity
from miaotui.compress.places import Model
from miaotui.compress.pruning.importance import Importance
from miaotui.compress.recipe import Calibration
from miaotui.compress.writing import dense
from miaotui.errors import CheckpointError, UsageError

Method = Literal["magnitude", "wanda", "sparsegpt"]
Storage = Literal["bitmask", "dense"]
By = Literal["similarity", "kl"]

MULTIPLE = 32
"""A share of channels or hidden dimensions is rounded to a multiple: kernels like whole vectors."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Cut:
    """What is to be left, as a number (`26`) or a share of what there was (`75%`). None: all of it.

    groups: heads of keys of each block, each with its queries. by: blocks go by how little they turn the residual
    stream, or one after the other by what the removal of each costs. correct: what is left makes up for what went.
    """

    blocks: str | None = None
    groups: str | None = None
    channels: str | None = None
    hidden: str | None = None
    by: By = "similarity"
    correct: bool = True

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise UsageError(f"Blocks cannot go by {self.by!r:.60}.", f"Choose one of {', '.join(get_args(By))}.")

    @property
    def anything(self) -> bool:
        return any((self.blocks, self.groups, self.channels, self.hidden))


@dataclass(frozen=True)
class PruneSettings:
    """Either `sparsity` (with its method and how zeros are stored) or a cut.

    cache: where statistics lie, for any pruning or compression of the same model by the same text; None: the product's.
    """

    sparsity: Sparsity | None = None
    method: Method = "sparsegpt"
    storage: Storage = "bitmask"
    cut: Cut = field(default_factory=Cut)
    calibration: Calibration = field(default_factory=Calibration)
    cache: Path | None = None

    def __post_init__(self) -> None:
        for value, known in ((self.method, get_args(Method)), (self.storage, get_args(Storage))):
            if value not in known:
                raise UsageError(f"There is no {value!r:.60}.", f"Choose one of {', '.join(known)}.")
        if self.sparsity is None and not self.cut.anything:
            raise UsageError(
                "Nothing is to be pruned.", "Give --sparsity, or what is to be left: --blocks, --channels, …"
            )
        if self.sparsity is not None and self.cut.anything:
            raise UsageError("A sparsity and a cut are two prunings.", "Cut first, and give what you get a --sparsity.")

    def plain(self) -> dict[str, Any]:
        """What decides the result, for prune.yaml."""
        if self.sparsity is None:
            plain: dict[str, Any] = {key: value for key, value in asdict(self.cut).items() if value is not None}
        else:
            plain = {"sparsity": str(self.sparsity), "method": self.method, "storage": self.storage}
        return plain


@dataclass(frozen=True)
class PruneReport:
    """What was written, and what was found out on the way.

    bytes: of the weights' files; dense_bytes: what they would be with every number stored. removed: old numbers of the
    blocks that went. kl: of removals, in nats a token: of each block alone (or in the last round), and of all together.
    errors: mean relative error of the outputs of the linears that were made sparse.
    """

    out: str
    parameters: int
    parameters_before: int
    zeros: float
    bytes: int
    dense_bytes: int
    seconds: float
    removed: tuple[int, ...] = ()
    kl: Mapping[int, float] = field(default_factory=dict)
    kl_together: float | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()
    calibration: Mapping[str, Any] | None = None


@dataclass(eq=False)
class Pruned:
    """What a way of pruning hands over to be written: the folder's tensors, and what is told of them."""

    tensors: list[dense.Written]
    config: dict[str, Any]
    importance: Importance
    sparse: Mapping[str, str] = field(default_factory=dict)
    zeros: int = 0
    removed: tuple[int, ...] = ()
    kl: Mapping[int, float] = field(default_factory=dict)
    kl_together: float | None = None
    error: float | None = None
    notes: list[str] = field(default_factory=list)
    calibration: Mapping[str, Any] | None = None


def prune(model: str, settings: PruneSettings, out: Path, *, tell: Tell = lambda done, total: None) -> PruneReport:
    """Prune a model of plain numbers into a new folder, with its tokenizer, and why it was cut there.

    Memory: one layer, its statistics, and the residual streams of the calibration. Disk: what was changed, twice.
    Raises UsageError for quantised models and for what cannot be left, UnsupportedModelError for families that cannot
    be cut so.
    """
    from miaotui.compress.pruning.cut import cut
    from miaotui.compress.pruning.shelf import shelf_beside
    from miaotui.compress.pruning.sparse import make_sparse
    from miaotui.compress.writing.sparse import write_sparse

    started = time.monotonic()
    opened = dense.open_dense(model, "prune")
    before = _parameters(dense.dense_shapes(opened).values())
    with atomic_folder(out) as folder, shelf_beside(out) as shelf:
        found = (cut if settings.sparsity is None else make_sparse)(opened, settings, shelf, tell)
        if found.sparse:
            write_sparse(folder, found.tensors, found.sparse, found.config, opened.checkpoint)
        else:
            dense.write_dense(folder, found.tensors, found.config, opened.checkpoint)
        _verify(folder, found.tensors)
        found.importance.write(folder)
        _write_notes(folder, model, settings, found)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parameters = _parameters(tensor.shape for tensor in found.tensors)
    return PruneReport(
        str(out),
        parameters,
        before,
        found.zeros / parameters,
        size,
        sum(math.prod(tensor.shape) * (4 if tensor.type == "float32" else 2) for tensor in found.tensors),
        time.monotonic() - started,
        found.removed,
        found.kl,
        found.kl_together,
        found.error,
        tuple(found.notes),
        found.calibration,
    )


def _parameters(shapes: Any) -> int:
    return sum(math.prod(shape) for shape in shapes)


def count_of(text: str | None, had: int, what: str, multiple: int = 1) -> int:
    """How many are left of `had`: `26`, or `75%` of them to a multiple. Raises UsageError for anything else."""
    if text is None:
        return had
    match = re.fullmatch(r"(\d{1,9})|(\d+(?:\.\d+)?)%", text.strip())
    if match is None:
        raise UsageError(f"The {what} to be left are {text!r:.40}.", f"Give a number up to {had}, or a share: 75%.")
    left = int(match[1]) if match[1] else max(1, round(had * float(match[2]) / 100 / multiple)) * multiple
    if not 0 < left <= had:
        raise UsageError(f"{left} of {had} {what} would be left.", f"Keep from 1 to {had}.")
    return left


# -- what is written ---------------------------------------------------------------------------------------------
def _verify(folder: Path, tensors: list[dense.Written]) -> None:
    """Read the folder back. Raises CheckpointError where a tensor is not what was meant, bit for bit."""
    from miaotui.model.families import read_spec

    checkpoint = open_checkpoint(folder)
    model = Model(checkpoint, *read_spec(checkpoint))
    wanted = dense.dense_shapes(model)
    for tensor in tensors:
        found = dense.dense_tensor(model, tensor.name)
        same = found.type == tensor.type and found.shape == tensor.shape
        if not same or found.data.tobytes() != dense.as_type(tensor.load(), tensor.type).tobytes():
            raise CheckpointError(
                f"{folder} is not what was meant: {tensor.name!r:.100} differs.",
                "Prune again; if that fails too, check the disk and the memory.",
            )
        if wanted.pop(tensor.name, found.shape) != found.shape:
            raise AssertionError(f"{tensor.name} does not have the shape that the configuration says")
    assert not wanted, f"the configuration asks for {min(wanted)}"


def _write_notes(folder: Path, model: str, settings: PruneSettings, found: Pruned) -> None:
    """prune.yaml, to make it again; README.md, to know what it is."""
    import yaml

    plain = {"model": model, **settings.plain()}
    if found.calibration is not None:
        plain["calibration"] = dict(found.calibration)
    if found.removed:
        plain["removed_blocks"] = sorted(found.removed)
    (folder / "prune.yaml").write_text(
        yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8"
    )
    told = "\n".join(f"- {note}" for note in found.notes)
    card = f"# Pruned model\n\n{model}, pruned by Miaotui.\n\n{told}\n\n"
    card += "`prune.yaml` has all settings, `importance.csv` and `importance.html` say why. "
    card += "The licence of the original applies.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
