"""A speed report for people: a table."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from miaotui.hardware.sensors import BUSY
from miaotui.measure.energy import HOT, sentence


def table(report: dict[str, Any]) -> RenderableType:
    """The report of `speed.run` as a table, with a line on the machine and one on the model."""
    rows = Table(
        "regime", "unit", *(("median", "95% interval", "p99", "ceiling", "of ceiling")), box=None, pad_edge=False
    )
    for column in rows.columns[2:]:
        column.justify = "right"
    for result in report["results"]:
        interval = f"{number(result['low'])} – {number(result['high'])}"
        ceiling = "" if result["ceiling"] is None else number(result["ceiling"])
        median, p99 = number(result["median"]), number(result["p99"])
        rows.add_row(result["regime"], result["unit"], median, interval, p99, ceiling, share(result))
    return Group(*(Text(line) for line in heading(report)), rows)


def profile_table(report: dict[str, Any]) -> RenderableType:
    """The report of `profile.run`: a table for each case, its ops from the slowest on."""
    tables: list[RenderableType] = []
    for case in report["cases"]:
        title = f"{case['case']}: {case['seconds'] * 1e3:.2f} ms a step"
        rows = Table("op", "number", "µs", "of step", "of ceiling", box=None, pad_edge=False, title=title)
        rows.title_justify = "left"
        for column in rows.columns[1:]:
            column.justify = "right"
        for line in case["lines"]:
            part = f"{100 * line['seconds'] / case['seconds']:.1f}%"
            reached = f"{100 * line['least'] / line['seconds']:.0f}%" if line["least"] else ""
            rows.add_row(line["op"], str(line["count"]), number(line["seconds"] * 1e6), part, reached)
        tables += [rows, Text("")]
    return Group(*tables)


def heading(report: dict[str, Any]) -> list[str]:
    """What was measured, on what."""
    machine, model, limits = report["machine"], report["model"], report["machine"]["ceilings"]
    made_up = ", random weights" if model.get("weights") == "dummy" else ""
    arithmetic = f"int8 {limits['int8'] / 1e12:.2f} TOPS" if model["integer"] else ""
    lines = [
        f"{model['name']} ({model['family']}, {model['weight_bytes'] / 1e6:.1f} MB of weights read a step{made_up})",
        f"{machine['cpu']}, {limits['threads']} threads, {machine['isa_level']}; measured: "
        + ", ".join(
            part
            for part in (
                f"{limits['bandwidth'] / 1e9:.1f} GB/s over {limits['working_set'] / 1e6:.0f} MB",
                arithmetic,
                f"float32 {limits['fp32'] / 1e12:.2f} TFLOP/s",
            )
            if part
        ),
    ]
    disturbance = machine["disturbance"]
    if disturbance["others"] >= BUSY:
        lines.append(f"disturbed: other processes used {disturbance['others']:.1f} cores meanwhile")
    if disturbance.get("throttled"):
        lines.append(f"disturbed: the processor slowed itself down {disturbance['throttled']} times: heat or power")
    if (celsius := disturbance.get("celsius")) is not None and celsius >= HOT:
        lines.append(f"disturbed: the hottest sensor stood at {celsius:.0f} °C")
    if "energy" in report:
        lines.append(sentence(report["energy"]))
    return lines


def share(result: dict[str, Any]) -> str:
    """How near the median is to the ceiling, as a percentage; empty without a ceiling."""
    if result["ceiling"] is None:
        return ""
    reached = result["median"] / result["ceiling"]
    return f"{100 * (reached if result['better'] == 'higher' else 1 / reached):.0f}%"


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
