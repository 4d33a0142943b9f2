"""A card in a terminal: caveats first, then the table, then why."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from miaotui.accelerate.card import facts, rows
from miaotui.accelerate.card.rows import Cell, Row
from miaotui.accelerate.card.schema import Card


def shown(card: Card) -> RenderableType:
    """Everything that fits a terminal; the report has the rest. What would steer the terminal is left out."""
    card = Card.parse(_harmless(card.plain()))
    return Group(*_head(card), *_measures(card), *_why(card), *_front(card), *_others(card), *_where(card))


def _harmless(value: Any) -> Any:
    """The same without control characters in its texts: a card may come from anywhere."""
    if isinstance(value, str):
        return "".join(letter for letter in value if letter in "\n\t" or unicodedata.category(letter) not in _STEERING)
    if isinstance(value, dict):
        return {_harmless(key): _harmless(item) for key, item in value.items()}
    return [_harmless(item) for item in value] if isinstance(value, list) else value


_STEERING = ("Cc", "Cf", "Cs")


def _head(card: Card) -> Iterator[RenderableType]:
    yield Text(card.artefact.name, "bold")
    yield Text(card.verdict)
    for caveat in card.caveats:
        yield Padding(Text(f"! {caveat}", "yellow"), (0, 0, 0, 2))


def _measures(card: Card) -> Iterator[RenderableType]:
    table = _grid("", "unit", "before", "after", "change", right=3)
    for row in rows.rows(card):
        table.add_row(Text(row.name), Text(row.unit), _cell(row.before), _cell(row.after), _change(row))
    yield from ("", table)
    before = card.quality.before
    yield Text(
        f"quality on {before.data}: {before.tokens:,} tokens, {before.windows} windows of {before.window}", "dim"
    )
    for note in (card.quality.after or before).notes:
        yield Text(note, "dim")
    for side, energy in (("before", card.energy.before), ("after", card.energy.after)):
        if energy is not None and energy.unavailable:
            yield Text(f"energy {side}: unavailable ({energy.unavailable})", "dim")
        for mark in () if energy is None else energy.marks:
            yield Text(f"energy {side}: {mark}", "yellow")


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–", "dim")
    return Text.assemble((cell.value, "bold"), (f"  {cell.interval}" if cell.interval else "", "dim"))


def _change(row: Row) -> Text:
    return Text(row.change, "" if row.better is None else "green" if row.better else "red")


def _why(card: Card) -> Iterator[RenderableType]:
    if not card.artefact.techniques:
        return
    table = _grid("", "", "")
    for one in sorted(card.artefact.techniques, key=lambda one: not one.kept):
        table.add_row(Text("kept", "green") if one.kept else Text("dropped", "dim"), Text(one.name), Text(one.why))
    table.show_header = False
    yield from ("", table)


def _front(card: Card) -> Iterator[RenderableType]:
    front = card.search.front()
    if not front:
        return
    table = _grid("not beaten in both", card.search.regime, "KL, nats", "")
    for trial in front:
        table.add_row(*(Text(one, "bold" if trial.state == "won" else "") for one in facts.trial_row(trial)))
    yield from ("", table)


def _others(card: Card) -> Iterator[RenderableType]:
    if not card.peers:
        return
    table = _grid("against", "regime", "ours", "theirs", "ratio", right=3)
    for peer in card.peers:
        name = " ".join(filter(None, (peer.name, peer.version, peer.weights)))
        for one in peer.results:
            table.add_row(Text(name), Text(one.regime), *map(Text, facts.peer_row(one)))
        if not peer.results:
            table.add_row(Text(name), "not measured", "", "", Text(peer.why or ""))
    yield from ("", table)


def _where(card: Card) -> Iterator[RenderableType]:
    yield ""
    found = dict(facts.machine(card.machine))
    machine = ", ".join(found[name] for name in ("Processor", "Instruction set", "Memory", "GPU") if name in found)
    limits = ", ".join(f"{name.lower()} {value}" for name, value in facts.limits(card.machine))
    versions = ", ".join(f"{name} {value}" for name, value in card.versions.items())
    for line in (machine, limits, versions, f"measured {card.created}"):
        if line:
            yield Text(line, "dim")
    for command in card.commands:
        yield Text(f"$ {command}", "dim")


def _grid(*heads: str, right: int = 0) -> Table:
    """`right`: how many of the last columns stand right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if index >= len(heads) - right else "left")
    return table
