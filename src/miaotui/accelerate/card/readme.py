"""README.md of an artefact: a model card as the Hugging Face hub reads it, its front matter and then the measured card.

Nothing that a card says becomes markup: names and sentences are escaped, commands and the recipe stand in code.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from miaotui.accelerate.card import facts, rows
from miaotui.accelerate.card.rows import Cell, Row
from miaotui.accelerate.card.schema import Card, Energy
from miaotui.checkpoint.beside import README, REPORT, beside
from miaotui.checkpoint.write import atomic_file

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def write(card: Card, artefact: Path) -> Path:
    """Write `README.md` into the artefact's folder, or beside its GGUF file, whole or not at all; its path."""
    path = beside(artefact, README)
    with atomic_file(path) as file:
        file.write(render(card, beside(artefact, REPORT).name).encode("utf-8", "backslashreplace"))
    return path


def render(card: Card, report: str = REPORT) -> str:
    """The whole text. `report` is the file that it points to for the charts."""
    parts = [*_head(card, report), *_table(card), *_use(card), *_why(card), *_search(card), *_others(card)]
    return "\n\n".join([front_matter(card), *parts, *_where(card)]) + "\n"


def front_matter(card: Card) -> str:
    """The hub's metadata: https://huggingface.co/docs/hub/model-cards. What is not known is left out."""
    values: dict[str, Any] = {}
    if card.model.license:
        values["license"] = card.model.license
    if card.model.base_model and _HUB_NAME.fullmatch(card.model.base_model):
        values["base_model"] = card.model.base_model
        if card.artefact.recipe:
            values["base_model_relation"] = "quantized"
    values |= {"pipeline_tag": "text-generation", "library_name": "miaotui"}
    scheme = (card.artefact.recipe or {}).get("scheme")
    tags = ["miaotui", card.artefact.format, scheme if isinstance(scheme, str) else None]
    values["tags"] = [tag for tag in tags if tag]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


# -- sections --------------------------------------------------------------------------------------------
def _head(card: Card, report: str) -> Iterator[str]:
    yield f"# {plain(card.artefact.name)}"
    yield f"**{plain(card.verdict)}**"
    if card.caveats:
        yield "\n".join(["> [!NOTE]", *(f"> - {plain(one)}" for one in card.caveats)])
    yield f"Charts and every trial: [{plain(report)}]({quote(report)}), one page that needs no network."


def _table(card: Card) -> Iterator[str]:
    yield "## Before and after"
    yield "Medians and estimates with their 95% intervals, measured on the files that are served, on the machine below."
    heads = ("", "before", "after", "change")
    yield table(heads, [_row(row) for row in rows.rows(card)], "lrrr")
    before = card.quality.before
    read = f"Quality on {plain(before.data)}: {before.tokens:,} tokens in {before.windows} windows of {before.window}."
    notes = (card.quality.after or before).notes
    yield "\n".join([read, *(f"{plain(note)}" for note in notes)])
    yield from (_energy(side, one) for side, one in _energies(card) if one.unavailable)


def _row(row: Row) -> tuple[str, ...]:
    unit = f", {row.unit}" if row.unit else ""
    return (f"{row.name}{unit}", _cell(row.before), _cell(row.after), row.change)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.value} ({cell.interval})" if cell.interval else cell.value


def _energies(card: Card) -> Iterator[tuple[str, Energy]]:
    yield "before", card.energy.before
    if card.energy.after is not None:
        yield "after", card.energy.after


def _energy(side: str, energy: Energy) -> str:
    return f"Energy {side}: unavailable ({plain(energy.unavailable or '')})."


def _use(card: Card) -> Iterator[str]:
    yield "## Use"
    name = shlex.quote(card.artefact.name)
    flags = shlex.join(_flags(card.artefact.options))
    line = f"miaotui serve {name} {flags}".strip()
    yield code("\n".join((f"miaotui run {name} 'The capital of France is'", line)), "console")
    if card.artefact.format == "compressed-tensors":
        yield "The weights are in the compressed-tensors format, which vLLM, SGLang and transformers also read."
    if card.artefact.recipe:
        yield "<details><summary>Recipe</summary>"
        yield code(json.dumps(card.artefact.recipe, indent=2, ensure_ascii=False), "json")
        yield "</details>"


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """LLM's keyword arguments as the command line spells them."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", value if isinstance(value, str) else json.dumps(value))


def _why(card: Card) -> Iterator[str]:
    if card.artefact.techniques:
        yield "## What was kept, and why"
        kept = sorted(card.artefact.techniques, key=lambda one: not one.kept)
        yield table(("", "", ""), [("kept" if o.kept else "dropped", o.name, o.why) for o in kept], "lll")


def _search(card: Card) -> Iterator[str]:
    search = card.search
    yield "## Search"
    floor = f"a floor of {rows.percent(card.floor.loss, 1)} perplexity ({card.floor.verdict})"
    spent = f"{search.spent / 60:.1f} of {search.budget / 60:.1f} minutes"
    yield (
        f"Goal: {plain(search.goal)}, within {floor}. {len(search.trials)} recipes were tried in {spent}, "
        f"seed {search.seed}."
    )
    front = search.front()
    if front:
        yield f"None of these is beaten in both by another; speed in {plain(search.regime)}:"
        yield table(("recipe", "speed", "KL, nats", "fate"), [facts.trial_row(one) for one in front], "lrrl")


def _others(card: Card) -> Iterator[str]:
    if not card.peers:
        return
    yield "## Other programs"
    yield "The same weights where their format allows, the same prompts, in turn with ours."
    measured = [
        (f"{peer.name} {peer.version or ''} {peer.weights or ''}".strip(), one.regime, *facts.peer_row(one))
        for peer in card.peers
        for one in peer.results
    ]
    if measured:
        yield table(("program", "regime", "ours", "theirs", "ratio"), measured, "llrrr")
    absent = [
        f"{plain(peer.name)}: not measured ({plain(peer.why or '?')})." for peer in card.peers if not peer.results
    ]
    if absent:
        yield "\n".join(absent)


def _where(card: Card) -> Iterator[str]:
    yield "## Measured with"
    found = [*facts.machine(card.machine), *facts.limits(card.machine), *card.versions.items()]
    yield table(("", ""), [*found, ("date", card.created)], "ll")
    if card.calibration:
        yield "Calibrated with " + ", ".join(f"{plain(k)} {plain(v)}" for k, v in card.calibration.items()) + "."
    if card.commands:
        yield "## Reproduce"
        yield code("\n".join(card.commands), "console")


# -- Markdown --------------------------------------------------------------------------------------------
def plain(value: object) -> str:
    """Text on one line that Markdown and HTML leave as it is."""
    text = " ".join(str(value).split())
    text = re.sub(r"([\\`*_\[\]#|~])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(heads: Sequence[str], body: Iterable[Sequence[object]], align: str) -> str:
    """A GitHub table; `align` has a letter for each column: l left, r right."""
    lines = [heads, [{"l": "---", "r": "---:"}[letter] for letter in align]]
    lines += [[plain(one) for one in row] for row in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str, language: str) -> str:
    """A fenced block, its fence longer than any within."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
