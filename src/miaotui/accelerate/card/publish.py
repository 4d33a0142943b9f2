"""Everything that a card becomes, written beside the artefact that it is about."""

from __future__ import annotations

from pathlib import Path

from miaotui.accelerate.card import files as cards
from miaotui.accelerate.card import readme, report
from miaotui.accelerate.card.schema import Card


def publish(card: Card, artefact: Path) -> list[Path]:
    """Write README.md, report.html and, last, card.json into the artefact's folder or beside its GGUF file.

    Each is whole or not at all, and card.json is there only when the others are. Returns the three paths.
    """
    return [readme.write(card, artefact), report.write(card, artefact), cards.write(card, artefact)]
