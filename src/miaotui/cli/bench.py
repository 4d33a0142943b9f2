"""`miaotui bench`: speed by regime, with intervals and ceilings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from miaotui.cli.options import MODEL, as_flags, engine_options, split_names, take_engine


@click.command("bench")
@MODEL
@click.option(
    "--regimes",
    metavar="A,B,…",
    help="Of start, load, peak-memory, prefill-512, decode-1@16, decode-1@512, throughput-8, throughput-64.  "
    "[default: all]",
)
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds after the warm-up.")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(model: str, regimes: str | None, repeat: int, as_json: bool, **options: Any) -> None:
    """Measure how fast MODEL runs here.

    Each figure comes with its 95% interval and beside the ceiling that this machine's measured bandwidth and peak set.
    """
    names = split_names(regimes, "--regimes")
    engine = take_engine(options)
    from miaotui.cli.probes import native_probes
    from miaotui.measure import speed

    settings = speed.Settings(model, engine, as_flags(engine))
    report = speed.run(settings, native_probes(), names=names, repeat=repeat, tell=teller())
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    from miaotui.measure.report import table

    Console(width=None if sys.stdout.isatty() else 120).print(table(report))


def teller() -> Callable[[str], None]:
    """Shows what is being done: one changing line on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda line: None
    return lambda line: click.echo(f"\r\033[K{line}", nl=False, err=True)
