"""report.html: a card as one page that needs nothing but itself, for screens of any width, both themes, and paper.

Everything that a card says is escaped by the template. The page asks for nothing: its own policy forbids it.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from miaotui.accelerate.card import charts, facts, rows
from miaotui.accelerate.card.schema import Card, Profile, Speed, Trial
from miaotui.accelerate.card.words import CHINESE
from miaotui.checkpoint.beside import REPORT, beside
from miaotui.checkpoint.write import atomic_file

WEB = Path(__file__).parent / "web"


def write(card: Card, artefact: Path) -> Path:
    """Write `report.html` into the artefact's folder, or beside its GGUF file, whole or not at all; its path."""
    return save(card, beside(artefact, REPORT))


def save(card: Card, path: Path) -> Path:
    """The same at a path of one's own."""
    with atomic_file(path) as file:
        file.write(render(card).encode("utf-8", "backslashreplace"))
    return path


def render(card: Card) -> str:
    """The whole page."""
    table = rows.rows(card)
    trials = card.search.trials
    return (
        _environment()
        .get_template("report.html")
        .render(
            card=card,
            css=Markup((WEB / "report.css").read_text(encoding="utf-8")),
            js=Markup((WEB / "report.js").read_text(encoding="utf-8")),
            table=table,
            heroes=heroes(card),
            ceilings=[row for row in table if any(one and one.share for one in (row.before, row.after))],
            charts=[c for c in (charts.pareto(card, 760, 430), charts.pareto(card, 340, 400)) if c is not None],
            trials=sorted(trials, key=lambda trial: _STATES.index(trial.state)),
            heat=charts.heat_map(card.sensitivity),
            machine=facts.machine(card.machine),
            limits=facts.limits(card.machine),
            recipe=None if not card.artefact.recipe else json.dumps(card.artefact.recipe, indent=2, ensure_ascii=False),
            description=card.verdict,
        )
    )


_STATES = ("won", "measured", "rejected", "failed")


# -- what the template is given -----------------------------------------------------------------------------
def heroes(card: Card) -> list[tuple[str, str, str, str]]:
    """The figures that stand large: (figure, what it is, a detail, a mood: good, bad or none)."""
    found = []
    pair = regime_of(card)
    if pair is not None:
        before, after = pair
        plain = f"{rows.number(before.median)} → {rows.number(after.median)} {after.unit}"
        gain = after.gain(before)
        words = "less memory" if after.unit == "MB" else "as fast"
        found.append((rows.times(gain), words, f"{after.regime}: {plain}", "good" if gain > 1 else "bad"))
    if card.floor.ratio is not None and not card.artefact.kept_original:
        change = rows.change_of(card.floor.ratio)
        mood = {"holds": "", "broken": "bad", "undecided": ""}[card.floor.verdict]
        found.append((change.value, "perplexity", f"95%: {change.interval}" if change.interval else "", mood))
    was, now = card.model.bytes, card.artefact.bytes
    if not card.artefact.kept_original and now and was != now:
        found.append(
            (rows.times(was / now), "smaller", f"{rows.size(was)} → {rows.size(now)}", "good" if now < was else "")
        )
    spent = f"{card.search.spent / 60:.1f} / {card.search.budget / 60:.1f} min"
    found.append((str(len(card.search.trials)), "recipes tried", spent, ""))
    return found


def regime_of(card: Card) -> tuple[Speed, Speed] | None:
    """Before and after in the regime that was asked for, or in the one that its goal is about."""
    pairs = {before.regime: (before, after) for before, after in card.speed.pairs() if before and after}
    names = (card.search.regime, _OF_GOAL.get(card.search.goal, ""), "decode-1@512", *pairs)
    return next((pairs[name] for name in names if name in pairs), None)


_OF_GOAL = {"latency": "decode-1@512", "throughput": "throughput-64", "memory": "peak-memory"}


def tip(trial: Trial) -> str:
    """What is told of a trial on hover, one fact a line."""
    lines = [trial.name]
    if trial.speed is not None:
        lines.append(f"{_told(trial.speed.median, trial.speed.low, trial.speed.high)} {trial.speed.unit}")
    if trial.kl is not None:
        lines.append(f"KL {_told(trial.kl.value, trial.kl.low, trial.kl.high)} nats")
    if trial.perplexity_ratio is not None:
        change = rows.change_of(trial.perplexity_ratio)
        lines.append(f"perplexity {change.value}" + (f" ({change.interval})" if change.interval else ""))
    if trial.bytes is not None:
        lines.append(rows.size(trial.bytes))
    return "\n".join([*lines, *([trial.why] if trial.why else [])])


def _told(value: float, low: float | None, high: float | None) -> str:
    one = rows.cell(value, low, high)
    return f"{one.value} ({one.interval})" if one.interval else one.value


def seconds(value: float) -> str:
    """A time that a step takes."""
    return f"{rows.number(value * 1e3)} ms" if value >= 1e-3 else f"{rows.number(value * 1e6)} µs"


def bars(profile: Profile) -> list[dict[str, Any]]:
    """A step's ops: their part of it, the part that physics asks for, and the share of the ceiling reached."""
    longest = max((line.seconds for line in profile.lines), default=0.0) or 1.0
    return [
        {
            "op": line.op,
            "count": line.count,
            "time": seconds(line.seconds),
            "part": rows.percent(line.seconds / profile.seconds, 1) if profile.seconds else "",
            "width": 100 * line.seconds / longest,
            "least": 100 * min(line.least, line.seconds) / longest,
            "share": rows.percent(line.least / line.seconds) if line.least and line.seconds else "",
        }
        for line in profile.lines
    ]


# -- words -----------------------------------------------------------------------------------------------
def both(text: str, tag: str = "span") -> Markup:
    """Our own words in English and Chinese, one of which the page hides. Words without a translation stand alone."""
    if text not in CHINESE:
        return escape(text)
    pair = '<{tag} class="en">{en}</{tag}><{tag} class="zh" lang="zh-CN">{zh}</{tag}>'
    return Markup(pair.format(tag=tag, en=escape(text), zh=escape(CHINESE[text])))


_REGIMES = (
    (r"start", "from the start of the process to the first text", "从进程启动到第一段文字"),
    (r"load", "loading in a warm process", "在已热的进程中加载"),
    (r"peak-memory", "resident, of a process that answers", "回答时进程的常驻内存峰值"),
    (r"prefill-(\d+)", "a prompt of {} tokens", "{} 个词元的提示"),
    (r"decode-1@long", "one sequence, as much behind it as fits", "单个序列，前文尽量长"),
    (r"decode-1@(\d+)", "one sequence, {} tokens behind it", "单个序列，前有 {} 个词元"),
    (r"throughput-(\d+)", "{} requests at once, 128 tokens in and out", "同时 {} 个请求，各输入输出 128 个词元"),
)


def explained(regime: str) -> Markup:
    """What a regime measures, in both languages; nothing for a name that is not ours."""
    for pattern, english, chinese in _REGIMES:
        if match := re.fullmatch(pattern, regime):
            count = match[1] if match.lastindex else ""
            pair = '<span class="en">{}</span><span class="zh" lang="zh-CN">{}</span>'
            return Markup(pair).format(english.format(count), chinese.format(count))
    return Markup("")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        t=both, ts=lambda text: both(text, "tspan"), explained=explained, tip=tip, bars=bars, seconds=seconds,
        number=rows.number, size=rows.size, times=rows.times, percent=rows.percent, change_of=rows.change_of,
    )  # fmt: skip
    return environment
