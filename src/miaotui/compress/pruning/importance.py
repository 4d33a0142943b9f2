"""Why a model was pruned as it was: importance.csv with every number, importance.html with the charts.

The page needs nothing from outside, and follows the reader's light or dark.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from miaotui.checkpoint.write import atomic_file
from miaotui.compress.pruning import svg

Shares = Mapping[int, list[float]]
Kept = Mapping[int, frozenset[int]]

HEADER = ("part", "block", "index", "importance", "kl", "kept")

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6570; --line: #d9dee4; --paper: #fff;
  --keep: #2563b8; --gone: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa4b0; --line: #363d46; --paper: #14171b;
  --keep: #6ea8ff; --gone: #ff9b62; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } p { color: var(--soft); }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); } .keep { fill: var(--keep); } .gone { fill: var(--gone); }
.line { fill: none; stroke: var(--keep); stroke-width: 2; } .mark { stroke: var(--gone); stroke-width: 1.5; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .9rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); }
"""


@dataclass(eq=False)
class Importance:
    """What was measured; each is empty where nothing depended on it.

    turn: 1 − cosine of a block's input and output. kl: of each block's removal alone, in nats. removed: blocks in the
    order in which they went. heads, channels: of each block, shares of its sum; hidden: of the model. errors: by layer
    and linear, ‖ΔW·X‖² / ‖W·X‖² of what was made sparse.
    """

    turn: dict[int, float] = field(default_factory=dict)
    kl: Mapping[int, float] = field(default_factory=dict)
    removed: tuple[int, ...] = ()
    heads: Shares = field(default_factory=dict)
    channels: Shares = field(default_factory=dict)
    hidden: list[float] = field(default_factory=list)
    kept_heads: Kept = field(default_factory=dict)
    kept_channels: Kept = field(default_factory=dict)
    kept_hidden: frozenset[int] = frozenset()
    errors: Mapping[tuple[int, str], float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """importance.csv and importance.html."""
        with (folder / "importance.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(HEADER)
            table.writerows(self.rows())
        with atomic_file(folder / "importance.html") as page:
            page.write(self.html().encode())

    def rows(self) -> Iterator[tuple[str, int | str, int | str, str, str, str]]:
        """The table; the importance of a linear (`sparse:…`) is its error."""
        for block, turn in self.turn.items():
            kl = f"{self.kl[block]:.6g}" if block in self.kl else ""
            yield "block", block, "", f"{turn:.6g}", kl, _word(block not in self.removed)
        for part, shares, kept in (
            ("heads", self.heads, self.kept_heads),
            ("channel", self.channels, self.kept_channels),
        ):
            for block, values in shares.items():
                for index, share in enumerate(values):
                    yield part, block, index, f"{share:.6g}", "", _word(index in kept.get(block, ()))
        for index, share in enumerate(self.hidden):
            yield "hidden", "", index, f"{share:.6g}", "", _word(index in self.kept_hidden)
        for (block, key), error in self.errors.items():
            yield f"sparse:{key}", block, "", f"{error:.6g}", "", ""

    # -- the page ------------------------------------------------------------------------------------------------
    def html(self) -> str:
        body = "\n".join(self._sections())
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Importance</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head><body>\n<h1>What pruning went by</h1>\n{body}\n</body></html>\n"
        )

    def _sections(self) -> Iterator[str]:
        if self.kl:
            yield from self._blocks()
        if self.heads:
            yield "<h2>Groups of heads</h2>"
            yield "<p>Each block's energy at attention's output, by group. Crossed: cut.</p>"
            gone = {(b, i) for b, row in self.heads.items() for i in range(len(row)) if i not in self._heads_of(b)}
            cells = {(block, index): share for block, row in self.heads.items() for index, share in enumerate(row)}
            yield svg.heat(cells, {i: f"group {i}" for i in range(max(map(len, self.heads.values())))}, gone)
        if self.channels:
            yield "<h2>Channels</h2>"
            yield "<p>The share of each block's energy at the MLP's output that its kept channels have.</p>"
            kept = {b: sum(row[i] for i in self.kept_channels.get(b, ())) for b, row in self.channels.items()}
            yield svg.bars({block: share for block, share in kept.items() if block in self.kept_channels})
        if self.hidden:
            yield "<h2>Hidden dimensions</h2>"
            yield "<p>What the most important dimensions give to all readers together; the line: how many are kept.</p>"
            yield svg.gathered(self.hidden, len(self.kept_hidden))
        if self.errors:
            yield "<h2>What sparse weights cost</h2>"
            yield "<p>Relative error of each linear's outputs, ‖ΔW·X‖² / ‖W·X‖², by block.</p>"
            keys = list(dict.fromkeys(key for _, key in self.errors))
            yield svg.heat({(b, keys.index(key)): e for (b, key), e in self.errors.items()}, dict(enumerate(keys)))
        if not (self.kl or self.heads or self.channels or self.hidden or self.errors):
            yield "<p>By the size of each weight alone: nothing was measured.</p>"

    def _heads_of(self, block: int) -> frozenset[int]:
        return self.kept_heads.get(block, frozenset())

    def _blocks(self) -> Iterator[str]:
        gone = frozenset(self.removed)
        yield "<h2>Blocks</h2>"
        yield "<p>How much each block turns the residual stream: 1 − cosine of its input and output. Orange: cut.</p>"
        yield svg.dots(self.turn, gone)
        yield "<p>What the removal of each block alone costs: KL of the next token's probabilities, in nats.</p>"
        yield svg.dots(self.kl, gone)
        yield '<div class="scroll"><table><tr><th>block</th><th>1 − cosine</th><th>KL, nats</th><th></th></tr>'
        for block, turn in self.turn.items():
            order = f"cut, {self.removed.index(block) + 1}." if block in gone else ""
            yield f"<tr><td>{block}</td><td>{turn:.4f}</td><td>{self.kl[block]:.4f}</td><td>{order}</td></tr>"
        yield "</table></div>"


def _word(kept: bool) -> str:
    return "yes" if kept else "no"
