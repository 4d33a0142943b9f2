"""`miaotui accelerate`: the fastest recipe within a quality floor, and the proof."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.options import MODEL, split_names
from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.accelerate.card.schema import Card

PEERS = ("transformers", "llama.cpp", "openvino", "vllm")
GOALS = ("latency", "throughput", "memory", "balanced")


class Share(click.ParamType[float]):
    """`1%` or `0.01`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", value.strip())
        share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 < share <= 1 or (match is not None and not match[2] and share >= 0.5):
            self.fail(f"{value!r} is no floor. Write how much perplexity may rise, such as 1% or 0.01.")
        return share


class Duration(click.ParamType[float]):
    """Seconds; `90s`, `15m` and `1.5h` likewise."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip().lower())
        seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
        if seconds < LEAST_BUDGET:
            self.fail(f"{value!r} is no budget. Write a time of {LEAST_BUDGET:g} seconds or more, such as 5m.")
        return seconds


LEAST_BUDGET = 30.0


@click.command("accelerate")
@MODEL
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--goal",
    type=click.Choice(GOALS),
    default="latency",
    show_default=True,
    help="What is to become better: an answer's seconds, tokens a second of many, bytes of memory, or all three.",
)
@click.option(
    "--floor",
    type=Share(),
    default="1%",
    show_default=True,
    metavar="SHARE",
    help="How much perplexity may rise: 1% or 0.01.",
)
@click.option(
    "--budget", type=Duration(), default="15m", show_default=True, metavar="TIME", help="How long to search: 3m, 1h."
)
@click.option(
    "--data",
    metavar="FILE",
    help="Text to measure quality on; one half chooses, the other confirms.  [default: the prose that Python carries]",
)
@click.option(
    "--calibration",
    metavar="FILE|self",
    help="Text to calibrate on; self: what the model writes itself.  [default: another part of that prose]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same search.")
@click.option(
    "--against",
    metavar="A,B,…",
    help=f"Measure these too, where they are installed: {', '.join(PEERS)}. Takes minutes beyond the budget.",
)
@click.option(
    "--tasks",
    metavar="A,B,…",
    help="Score these tasks too, as evaluate does: needle, or any of lm-eval's. Takes minutes beyond the budget.",
)
@click.option("--task-limit", type=click.IntRange(min=1), help="Examples of each of lm-eval's tasks at most.")
@click.option("--explain", is_flag=True, help="Say of what was dropped, too, why it was.")
@click.option("--restart", is_flag=True, help="Begin anew, where an earlier search was stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")  # fmt: skip
def command(
    model: str,
    out: Path,
    goal: Any,
    floor: float,
    budget: float,
    data: str | None,
    calibration: str | None,
    seed: int,
    against: str | None,
    tasks: str | None,
    task_limit: int | None,
    explain: bool,
    restart: bool,
    as_json: bool,
) -> None:
    """Find the fastest form of MODEL that keeps its quality, and prove both.

    Weights, number types and ways to serve are tried, the promising first. What wins within the floor is measured in
    full beside the original and written with its card. A search that was stopped goes on when asked for again.
    """
    peers = _peers(against)
    names = tuple(split_names(tasks, "--tasks") or ())
    if task_limit is not None and not names:
        raise UsageError("--task-limit bounds tasks that are not named.", "Add --tasks.")
    from miaotui.accelerate.run import Request, accelerate
    from miaotui.accelerate.search.attempt import Plan
    from miaotui.cli.probes import native_probes

    plan = Plan(goal, floor, budget, seed)
    request = Request(model, out, plan, data, calibration, peers, names, task_limit, _command_line())
    card = accelerate(
        request,
        native_probes(),
        restart=restart,
        write=_own_text(model) if calibration == "self" else None,
        tell=_teller(),
    )
    _show(card, out, explain=explain, as_json=as_json)


def _show(card: Card, out: Path, *, explain: bool, as_json: bool) -> None:
    click.echo(f"wrote {out}: {'its card' if card.artefact.kept_original else 'the artefact and its card'}", err=True)
    if as_json:
        click.echo(json.dumps(card.plain(), ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    from miaotui.accelerate.card.terminal import shown

    if not explain:
        kept = tuple(technique for technique in card.artefact.techniques if technique.kept)
        card = replace(card, artefact=replace(card.artefact, techniques=kept))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(shown(card))


def _peers(against: str | None) -> tuple[str, ...]:
    names = split_names(against, "--against") or []
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--against knows no {name!r:.60}.", f"Choose from {', '.join(PEERS)}.")
    return tuple(dict.fromkeys(names))


def _own_text(model: str) -> Any:
    from miaotui.cli.self_text import self_text

    return self_text(model, tell=_teller())


def _command_line() -> str:
    """What was typed, as a shell reads it."""
    context = click.get_current_context()
    arguments = context.meta.get("arguments", sys.argv[1:])
    return shlex.join(["miaotui", *arguments])


def _teller() -> Any:
    """One changing line on a terminal; elsewhere a line for each stage, without layer by layer."""
    if sys.stderr.isatty():
        return lambda line: click.echo(f"\r\033[K{line[:110]}", nl=False, err=True)
    return lambda line: None if re.search(r" \d+/\d+$", line) or not line else click.echo(line, err=True)
