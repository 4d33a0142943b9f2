"""card.json: written, found and read."""

from __future__ import annotations

import json
from pathlib import Path

from miaotui.accelerate.card.schema import REMAKE, Card
from miaotui.checkpoint.beside import CARD, beside, find_beside
from miaotui.checkpoint.write import write_json
from miaotui.errors import CheckpointError


def write(card: Card, artefact: Path) -> Path:
    """Write `card.json` into the artefact's folder, or beside its GGUF file, whole or not at all; its path."""
    path = beside(artefact, CARD)
    write_json(path, card.plain())
    return path


def read(path: Path) -> Card:
    """The card of an artefact, a folder or a file of weights, or the card at this path itself.

    Raises CheckpointError where there is none, or one that cannot be read.
    """
    path = find(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}.", REMAKE) from error
    return Card.parse(values, str(path))


def find(path: Path) -> Path:
    """Where the card of an artefact lies. Raises CheckpointError when there is none."""
    if path.is_file() and path.suffix == ".json":
        return path
    card = find_beside(path, CARD)
    if card is None:
        there = "There is no" if path.exists() else f"{path} is not there, nor"
        raise CheckpointError(f"{there} {beside(path, CARD)}.", "Name what miaotui accelerate has written.")
    return card
