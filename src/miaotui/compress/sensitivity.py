"""Mixed precision: what each linear loses under each of a budget's choices, and which gets which.

Sensitivity is the relative error of a linear's output, ‖ΔW·X‖² / ‖W·X‖², when it alone is rounded to nearest, on the
statistics of the original. Linears that engines read as one matrix (q, k and v; gate and up; a layer's experts) choose
together. See `methods.budget` for how the choices are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch

from miaotui.checkpoint.write import write_json
from miaotui.compress.layers import read_layer
from miaotui.compress.methods.budget import assign
from miaotui.compress.progress import Clock, Tell, silent
from miaotui.compress.recipe import parse_scheme
from miaotui.compress.solve import solve
from miaotui.compress.statistics import attach
from miaotui.compress.types import LinearScheme, Place
from miaotui.compress.work import Work

FILE = "sensitivity.json"


@dataclass(frozen=True)
class Unit:
    """Linears that choose together: their places, weights in all, and the error under each choice."""

    layer: int
    role: str
    places: tuple[Place, ...]
    size: int
    width: int
    errors: tuple[float, ...]


class Kept(TypedDict):
    """A unit as it is kept on disk."""

    size: int
    width: int
    errors: list[float]


def budgeted(work: Work, tell: Tell = silent) -> Mapping[Place, LinearScheme]:
    """The scheme of every linear by the recipe's budget; nothing where it has none.

    Where a linear has an override it keeps that, and is no part of the average. Raises UsageError for a budget that
    cannot be kept.
    """
    budget = work.recipe.budget
    if budget is None:
        return {}
    choices = [parse_scheme(text, work.scale_type) for text in budget.choices]
    units = measure(work, choices, tell)
    bits = [[choice.bits(unit.width) for choice in choices] for unit in units]
    chosen = assign([unit.errors for unit in units], [unit.size for unit in units], bits, budget.bits)
    return {place: choices[pick] for unit, pick in zip(units, chosen, strict=True) for place in unit.places}


def measure(work: Work, choices: list[LinearScheme], tell: Tell = silent) -> list[Unit]:
    """Every unit's errors, kept in the work folder so that they are measured once."""
    path = work.folder / FILE
    layers = len(work.model.spec.layers)
    found = _read(path, work.belongs_to)
    clock = Clock(tell, "sensitivity", layers)
    clock.kept(len(found))
    with torch.no_grad():
        for index in range(len(found), layers):
            found.append(_layer(work, index, choices))
            clock.step()
            if index + 1 == layers or (index + 1) % 8 == 0:
                write_json(path, {"belongs_to": work.belongs_to, "layers": found})
    return [
        Unit(index, role, tuple(_places(work, index, role)), one["size"], one["width"], tuple(one["errors"]))
        for index, layer in enumerate(found)
        for role, one in layer.items()
    ]


def _read(path: Path, belongs_to: str) -> list[dict[str, Kept]]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return list(kept["layers"]) if kept.get("belongs_to") == belongs_to else []


def _layer(work: Work, index: int, choices: list[LinearScheme]) -> dict[str, Kept]:
    """By role: size, width, and the error under each choice, weighed by size where experts share a role."""
    assert work.statistics is not None, "a budget needs statistics"
    steps = replace(work.steps, rounder="rtn", rtn=replace(work.steps.rtn, fit="mse"))
    layer = read_layer(work.model, index, work.scheme_of)
    attach(layer, work.statistics.layer(index))
    found: dict[str, Kept] = {}
    for group in layer.groups.values():
        if _overridden(work, group.places[0]):
            continue
        weight = torch.cat(group.weights)
        errors = [solve(weight, choice, group.statistics, steps).error for choice in choices]
        size = weight.numel()
        before = found.get(group.role)
        if before is not None:
            had = before["size"]
            errors = [(a * had + b * size) / (had + size) for a, b in zip(before["errors"], errors, strict=True)]
            size += had
        found[group.role] = {"size": size, "width": weight.shape[1], "errors": errors}
    return found


def _places(work: Work, index: int, role: str) -> list[Place]:
    places = (place for place in work.model.places() if place.layer == index and place.role == role)
    return [place for place in places if not place.bias]


def _overridden(work: Work, place: Place) -> bool:
    return bool(work.recipe.overriding(place.name(work.model.names).removesuffix(".weight")))
