"""Whole blocks, groups of heads, channels and hidden dimensions cut out, by what calibration says of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from miaotui.compress.layers import read_layer, read_matrix
from miaotui.compress.methods import structured
from miaotui.compress.places import Model
from miaotui.compress.precision import products
from miaotui.compress.pruning import narrow
from miaotui.compress.pruning.importance import Importance
from miaotui.compress.pruning.known import Calibrated, calibrated
from miaotui.compress.pruning.narrow import Kept, Sizes
from miaotui.compress.pruning.removal import run_without
from miaotui.compress.pruning.run import MULTIPLE, Cut, Pruned, PruneSettings, Tell, count_of
from miaotui.compress.pruning.shelf import Shelf
from miaotui.compress.pruning.sparse import half
from miaotui.compress.types import Layer, Place
from miaotui.compress.writing import dense
from miaotui.errors import UsageError

KL_TOKENS = 2048
"""Tokens of the calibration on which removals are measured."""

NAMES = {
    "layers": "blocks",
    "groups": "groups of heads a block",
    "channels": "channels a block",
    "hidden": "hidden dimensions",
}


def cut(model: Model, settings: PruneSettings, shelf: Shelf, tell: Tell) -> Pruned:
    """Measure, choose what stays, and cut. The folder's tensors lie on the shelf where they changed."""
    wanted = sizes(model, settings.cut)
    narrow.check_sizes(model.spec, wanted)
    every = Kept(tuple(range(len(model.spec.layers))), {}, {})
    _config(model, every, replace(wanted, layers=len(every.layers)))  # refuses before the long work
    found = calibrated(model, settings.calibration, settings.cache, half(tell, 0))
    with torch.no_grad():
        made = _Cutting(model, settings.cut, wanted, found)
        made.look()
        made.choose(half(tell, 1))
        pruned = made.pruned(shelf)
        pruned.calibration = found.text.report()
    return pruned


def sizes(model: Model, cut: Cut) -> Sizes:
    """How large the model is to be. Raises UsageError for what leaves all of it, or nothing."""
    whole, first = Sizes.of(model.spec), model.spec.layers[0].attention
    groups = count_of(cut.groups, whole.groups, "groups of heads")
    heads = first.heads // first.kv_heads * groups
    wanted = Sizes(
        count_of(cut.blocks, whole.layers, "blocks"),
        groups,
        count_of(cut.channels, whole.channels, "channels", MULTIPLE),
        count_of(cut.hidden, whole.hidden, "hidden dimensions", _even(whole.hidden, heads)),
    )
    if vars(wanted) == vars(whole):
        raise UsageError("Nothing would be cut: all of it is left.", "Keep less of something.")
    return wanted


def _config(model: Model, kept: Kept, sizes: Sizes) -> dict[str, Any]:
    """config.json of what is left. Raises UnsupportedModelError where the family has no such model."""
    source, spec = model.checkpoint, model.spec
    changes = narrow.config_changes(source.config.get("text_config") or source.config, spec, kept, sizes)
    config = dense.plain_config(source, **changes)
    narrow.smaller_spec(config, spec, kept, sizes)
    return config


def _even(hidden: int, heads: int) -> int:
    """What a share of hidden dimensions is rounded to: whole heads, and whole vectors where that is not too coarse."""
    return next((step for wide in (MULTIPLE, 16, 8) if (step := math.lcm(wide, heads)) <= hidden // 8), heads)


@dataclass(eq=False)
class _Cutting:
    model: Model
    settings: Cut
    sizes: Sizes
    found: Calibrated

    def __post_init__(self) -> None:
        self.whole = Sizes.of(self.model.spec)
        self.importance = Importance()
        self.heads: dict[int, torch.Tensor] = {}
        self.channels: dict[int, torch.Tensor] = {}
        self.hidden = torch.zeros(())
        self.removed: list[int] = []
        self.kl: dict[int, float] = {}
        self.kl_together: float | None = None

    # -- what is important ---------------------------------------------------------------------------------------
    def look(self) -> None:
        """Measure every part of every layer."""
        for index in range(self.whole.layers):
            statistics, layer = self.found.statistics.layer(index), read_layer(self.model, index)
            self.importance.turn[index] = 1 - statistics.similarity
            heads, channels = narrow.layer_importance(layer, statistics.inputs)
            self.heads[index] = structured.shares(heads)
            if channels is not None:
                self.channels[index] = structured.shares(channels)
                self.hidden = self.hidden + narrow.hidden_importance(layer, statistics.inputs)

    def choose(self, tell: Tell) -> None:
        """What stays, by what was measured."""
        if self.sizes.layers < self.whole.layers:
            self._choose_blocks(tell)
        hidden = None
        if self.sizes.hidden < self.whole.hidden:
            hidden = structured.most_important(self.hidden, self.sizes.hidden)
        layers = tuple(i for i in range(self.whole.layers) if i not in self.removed)
        groups, channels = self.sizes.groups, self.sizes.channels
        self.kept = Kept(
            layers,
            {i: structured.most_important(self.heads[i], groups) for i in layers if groups < self.whole.groups},
            {
                i: structured.most_important(self.channels[i], channels)
                for i in layers
                if channels < self.whole.channels
            },
            hidden,
        )
        self._tell_importance()

    def _choose_blocks(self, tell: Tell) -> None:
        count, turn = self.whole.layers - self.sizes.layers, self.importance.turn
        rounds = count if self.settings.by == "kl" else 1
        done = 0

        def costs(gone: frozenset[int]) -> dict[int, float]:
            nonlocal done
            rest = [i for i in range(self.whole.layers) if i not in gone]
            steps, base = self.whole.layers * (rounds + 1), done * self.whole.layers
            found = self._kl([gone | {i} for i in rest], lambda at, of: tell(base + at, steps))
            done += 1
            return dict(zip(rest, found, strict=True))

        if self.settings.by == "kl":
            self.removed, tables = structured.drop_greedily(count, costs)
            self.kl = {block: table[block] for block, table in zip(self.removed, tables, strict=True)}
            self.importance.kl = tables[0]
            self.kl_together = tables[-1][self.removed[-1]]
            return
        self.removed = sorted(turn, key=lambda block: (turn[block], block))[:count]
        self.importance.kl = costs(frozenset())
        self.kl = {block: self.importance.kl[block] for block in self.removed}
        (self.kl_together,) = self._kl([frozenset(self.removed)], lambda at, of: None)

    def _kl(self, variants: list[frozenset[int]], tell: Tell) -> list[float]:
        with products(self.found.precision) as product:
            streams = run_without(self.model, self.found.tokens(KL_TOKENS), variants, product=product, tell=tell)
            return streams.costs(product)

    def _tell_importance(self) -> None:
        told = self.importance
        told.removed = tuple(self.removed)
        told.heads = {i: shares.tolist() for i, shares in self.heads.items()} if self._fewer("groups") else {}
        told.channels = {i: shares.tolist() for i, shares in self.channels.items()} if self._fewer("channels") else {}
        told.kept_heads = {i: frozenset(kept.tolist()) for i, kept in self.kept.groups.items()}
        told.kept_channels = {i: frozenset(kept.tolist()) for i, kept in self.kept.channels.items()}
        if self.kept.hidden is not None:
            told.hidden = structured.shares(self.hidden).tolist()
            told.kept_hidden = frozenset(self.kept.hidden.tolist())

    def _fewer(self, what: str) -> bool:
        return bool(getattr(self.sizes, what) < getattr(self.whole, what))

    # -- cutting -------------------------------------------------------------------------------------------------
    def pruned(self, shelf: Shelf) -> Pruned:
        """The tensors of the smaller model; those that only got another name are the original's."""
        spec, kept = self.model.spec, self.kept
        config = _config(self.model, kept, self.sizes)
        if self._fewer("groups") or self._fewer("channels") or self._fewer("hidden"):
            for index in kept.layers:
                layer, statistics = read_layer(self.model, index), self.found.statistics.layer(index).inputs
                narrow.cut_layer(spec, layer, kept, statistics, self.settings.correct)
                self._shelve(layer, shelf)
            self._shelve_ends(shelf)
        tensors = list(self._tensors(shelf))
        return Pruned(
            tensors, config, self.importance, removed=tuple(self.removed), kl=self.kl, kl_together=self.kl_together,
            notes=list(self._notes()),
        )  # fmt: skip

    def _shelve(self, layer: Layer, shelf: Shelf) -> None:
        for group in layer.groups.values():
            biases = [None] * len(group.weights) if group.biases is None else group.biases
            for place, weight, bias in zip(group.places, group.weights, biases, strict=True):
                self._put(shelf, place, weight)
                if bias is not None:
                    self._put(shelf, replace(place, bias=True), bias)
        if self.kept.hidden is not None:
            for role in {"attention_norm", "mlp_norm"} & layer.norms.keys():
                self._put(shelf, Place(role, layer.index), layer.norms[role] - self.model.spec.norm_offset)

    def _shelve_ends(self, shelf: Shelf) -> None:
        hidden, spec = self.kept.hidden, self.model.spec
        if hidden is None:
            return
        head = self.found.statistics.head()
        self._put(shelf, Place("embedding"), read_matrix(self.model, "embedding")[:, hidden])
        norm = torch.from_numpy(np.array(self.model.values(Place("norm")).dense32()))
        self._put(shelf, Place("norm"), narrow.cut_norm(norm, hidden, head) - spec.norm_offset)
        if not spec.tied_head:
            moment = head.moment if self.settings.correct else None
            self._put(shelf, Place("head"), structured.keep_columns(read_matrix(self.model, "head"), hidden, moment))

    def _put(self, shelf: Shelf, place: Place, values: torch.Tensor) -> None:
        name = self.model.name(place)
        shelf.put(name, values.numpy(), dense.dense_tensor(self.model, name).type)

    def _tensors(self, shelf: Shelf) -> Iterator[dense.Written]:
        """Every place under its new number."""
        numbers = {-1: -1} | {old: new for new, old in enumerate(self.kept.layers)}
        for place in self.model.places():
            if place.layer not in numbers:
                continue
            old, new = self.model.name(place), replace(place, layer=numbers[place.layer]).name(self.model.names)
            tensor = shelf.get(old) if old in shelf else dense.dense_tensor(self.model, old)
            yield dense.Written(
                new, tensor.type, tensor.shape, partial(_load, shelf if old in shelf else self.model, old)
            )

    def _notes(self) -> Iterator[str]:
        for what, name in NAMES.items():
            if self._fewer(what):
                yield f"{getattr(self.sizes, what)} of {getattr(self.whole, what)} {name} are left."
        if self.kl_together is not None and math.isfinite(self.kl_together):
            blocks = ", ".join(map(str, sorted(self.removed)))
            yield f"Without blocks {blocks} the next token's probabilities move by {self.kl_together:.3g} nats (KL)."
        yield "Distil it from the original to win back part of what it lost."


def _load(where: Shelf | Model, name: str) -> dense.Floats:
    return where.get(name).dense32() if isinstance(where, Shelf) else dense.dense_tensor(where, name).dense32()
