"""The report for people: a markdown table and a chart as plain SVG, both from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

OURS = "miaotui"
Json = Mapping[str, Any]
LEAST_FOR_INTERVAL = 3
"""Pairs below which an interval would only look like one."""


def markdown(report: Json) -> str:
    """One table of all peers, then what disturbed it and what was not measured."""
    machine, model = report["machine"], report["model"]
    options = "".join(f", {OURS} with {name} {value}" for name, value in report["options"].items())
    lines = [
        f"{model['title']}; {machine['cpu']}, {report['threads']} threads, {machine['isa_level']}{options}. "
        "Medians of alternating runs, tokens/s; in brackets the 95% interval of the ratio's median.",
        "",
        f"| peer | weights | regime | {OURS} | peer | ratio | {OURS} of ceiling, sustained | peer of ceiling | pairs |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in report["peers"]:
        lines += [_row(peer, result) for result in peer["results"]]
    notes = [note for peer in report["peers"] for note in _disturbances(peer)]
    notes += [f"Not measured: {entry['name']}, because {entry['why']}." for entry in report["not_measured"]]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _row(peer: Json, result: Json) -> str:
    ours, theirs, ratio = result["ours"], result["peer"], result["ratio"]
    interval = f" ({ratio['low']:.2f}–{ratio['high']:.2f})" if result["pairs"] >= LEAST_FOR_INTERVAL else ""
    cells = (
        f"{peer['name']} {next(iter(peer['versions'].values()))}",
        peer["weights"]["weights"],
        result["regime"],
        _value(ours),
        _value(theirs),
        f"**{ratio['median']:.2f}×**{interval}",
        ", ".join(filter(None, (_percent(ours["of_ceiling"]), _percent(ours["of_sustained"])))),
        _percent(theirs["of_ceiling"]),
        str(result["pairs"]),
    )
    return "| " + " | ".join(cells) + " |"


def _value(figure: Json) -> str:
    return f"{figure['median']:,.0f} ±{50 * figure['spread']:.0f}%"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _disturbances(peer: Json) -> list[str]:
    found = []
    for key, what in (("left_out", "left out"), ("disturbed", "counted all the same, too few being left")):
        if count := sum(result[key] for result in peer["results"]):
            found.append(f"{peer['name']}: {count} pairs were disturbed by other processes and {what}.")
    return found


# -- chart ---------------------------------------------------------------------------------------------------
BAR, GAP, LABEL, LENGTH, MARGIN = 18, 5, 150, 420, 16
ACCENT, GREY, TEXT = "#d1495b", "#8d99ae", "#6b7280"
"""Readable on a light and on a dark page."""


def chart(report: Json) -> str:
    """For each regime one bar for ours and one for each peer, on the regime's own scale."""
    y, body = MARGIN, []
    for regime, bars in _by_regime(report).items():
        body.append(_text(MARGIN, y + 13, regime, bold=True))
        y += 22
        longest = max(value for _, value in bars)
        for name, value in bars:
            body += _bar(y, name, value, value / longest)
            y += BAR + GAP
        y += 12
    model = report["model"]["title"]
    foot = f"tokens/s, {model}, {report['machine']['cpu']}, {report['threads']} threads"
    body.append(_text(MARGIN, y + 6, foot))
    width, height = 2 * MARGIN + LABEL + LENGTH + 60, y + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    title = f"<title>{escape(foot)}</title>"
    return "\n".join([f'{head} font-family="sans-serif" font-size="12" role="img">', title, *body, "</svg>", ""])


def _by_regime(report: Json) -> dict[str, list[tuple[str, float]]]:
    """Regime → bars; ours is the median of its medians against all peers."""
    found: dict[str, list[tuple[str, float]]] = {}
    mine: dict[str, list[float]] = {}
    for peer in report["peers"]:
        for result in peer["results"]:
            found.setdefault(result["regime"], []).append((peer["name"], result["peer"]["median"]))
            mine.setdefault(result["regime"], []).append(result["ours"]["median"])
    return {regime: [(OURS, median(mine[regime])), *bars] for regime, bars in found.items()}


def _bar(y: int, name: str, value: float, share: float) -> Sequence[str]:
    colour, length = ACCENT if name == OURS else GREY, max(1.0, LENGTH * share)
    start = MARGIN + LABEL
    return (
        _text(start - 8, y + 13, name, anchor="end"),
        f'<rect x="{start}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
        _text(start + length + 6, y + 13, f"{value:,.0f}"),
    )


def _text(x: float, y: float, text: str, *, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{TEXT}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
