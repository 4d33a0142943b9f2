"""`miaotui bench`: speed by regime, with intervals and ceilings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from miaotui.cli.load import as_served
from miaotui.cli.options import MODEL, as_flags, measured_engine_options, split_names, take_engine


@click.command("bench")
@MODEL
@click.option(
    "--regimes",
    metavar="A,B,…",
    help="Of start, load, peak-memory, prefill-512, decode-1@16, decode-1@512, throughput-8, throughput-64, "
    "decode-1@long.  [default: all but the last]",
)
@click.option("--repeat", type=click.IntRange(min=1), help="Rounds after the warm-up.  [default: 5]")
@click.option(
    "--dummy-weights",
    is_flag=True,
    help="MODEL is a config.json, or a folder with one: random weights of its shapes are measured.",
)
@click.option(
    "--quantization",
    metavar="KIND",
    help="Of dummy weights: q4_0, q4_1, q8_0, q4_k, …, w4g32-sym, w4g32-asym, w8-channel, bf16, fp16, fp32.  "
    "[default: q4_0]",
)
@click.option("--layers", type=click.IntRange(min=1), help="Of dummy weights: the first layers only.")
@click.option("--profile", is_flag=True, help="Show where a step's time goes, op by op, instead of the regimes.")
@measured_engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")  # fmt: skip
def command(
    model: str,
    regimes: str | None,
    repeat: int | None,
    profile: bool,
    dummy_weights: bool,
    quantization: str | None,
    layers: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how fast MODEL runs here.

    Each figure comes with its 95% interval and beside the ceiling that this machine's measured bandwidth and peak set.
    """
    if not dummy_weights and (quantization or layers):
        raise click.UsageError("--quantization and --layers are of --dummy-weights: MODEL's own run as they are.")
    if profile and (regimes or repeat):
        raise click.UsageError("--profile has cases of its own; leave --regimes and --repeat out.")
    names = split_names(regimes, "--regimes")
    engine = take_engine(options)
    if not dummy_weights:
        engine = as_served(model, engine)
    from miaotui.cli.probes import native_probes
    from miaotui.measure import profile as profiling
    from miaotui.measure import report as reporting
    from miaotui.measure import speed

    settings = speed.Settings(model, engine, as_flags(engine))
    if dummy_weights:
        again = not profile and any(regime.name in speed.LOAD_AGAIN for regime in speed.select(names))
        name = _dummy(model, quantization or "q4_0", layers, copies=2 if again else 1)
        settings = speed.Settings(name, engine, ["--raw", *as_flags(engine)], "dummy")
    if profile:
        report = profiling.run(settings, native_probes(), tell=teller())
    else:
        report = speed.run(settings, native_probes(), names=names, repeat=repeat or 5, tell=teller())
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    table = reporting.profile_table if profile else reporting.table
    Console(width=None if sys.stdout.isatty() else 120).print(table(report))


def _dummy(config: str, kind: str, layers: int | None, *, copies: int) -> str:
    """The name of the dummy model, refused here when this machine cannot hold it as often as it will be loaded."""
    from miaotui.hardware.detect import available_memory
    from miaotui.model.dummy import dummy_name, open_dummy

    name = dummy_name(config, kind, layers)
    open_dummy(name).check_memory(available_memory(), copies)
    return name


def teller() -> Callable[[str], None]:
    """Shows what is being done: one changing line on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda line: None
    return lambda line: click.echo(f"\r\033[K{line}", nl=False, err=True)
