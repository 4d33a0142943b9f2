"""`miaotui prune`: weights set to 0, or blocks, heads, channels and hidden dimensions cut out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from miaotui.cli.merge import needs_torch
from miaotui.cli.options import MODEL
from miaotui.cli.progress import progress
from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.compress.pruning.run import PruneReport

OF_ZEROS, OF_CUTS = ("method", "storage"), ("by", "correct")


@click.command("prune")
@MODEL
@click.option(
    "--sparsity", metavar="SHARE|N:M", help="Set this share of each linear's weights to 0, or all but N of every M."
)
@click.option(
    "--method",
    type=click.Choice(["magnitude", "wanda", "sparsegpt"]),
    default="sparsegpt",
    show_default=True,
    help="How weights are chosen; sparsegpt also moves the others.",
)
@click.option(
    "--storage",
    type=click.Choice(["bitmask", "dense"]),
    default="bitmask",
    show_default=True,
    help="bitmask leaves zeros out of the file; any runtime loads dense.",
)
@click.option("--blocks", metavar="N|SHARE", help="Keep this many decoder blocks.")
@click.option(
    "--kv-heads", "groups", metavar="N|SHARE", help="Keep this many heads of keys a block, each with its queries."
)
@click.option("--channels", metavar="N|SHARE", help="Keep this many channels of each MLP.")
@click.option("--hidden", metavar="N|SHARE", help="Keep this many hidden dimensions.")
@click.option(
    "--by",
    type=click.Choice(["similarity", "kl"]),
    default="similarity",
    show_default=True,
    help="Blocks go by how little they change, or one by one by what each costs (slower).",
)
@click.option(
    "--correct/--no-correct", default=True, show_default=True, help="Let what is left make up for what is cut."
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="Text, JSON lines or Parquet to measure on.  [default: the prose that Python carries]",
)
@click.option("--windows", type=int, default=64, show_default=True, help="Windows of it.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens of a window.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the windows that are drawn.")
@click.option(
    "-o", "--output", "out", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="The new folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(
    context: click.Context, /, model: str, sparsity: str | None, out: Path, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Prune MODEL: set single weights to 0 (--sparsity), or cut out what matters least.

    A cut leaves a smaller dense model, which is faster everywhere. Zeros save space on disk, and no time. MODEL is
    safetensors that are not quantised. importance.html in the new folder shows what was cut and why.
    """
    _refuse_idle(context, sparsity is None)
    try:
        from miaotui.compress.methods.sparsity import Sparsity
        from miaotui.compress.pruning.run import Cut, PruneSettings, prune
        from miaotui.compress.recipe import Calibration
    except ImportError as error:
        raise needs_torch(error) from error
    take = options.pop
    calibration = Calibration(take("calibration"), take("windows"), take("window"), take("seed"))
    given = None if sparsity is None else Sparsity.parse(sparsity)
    settings = PruneSettings(given, take("method"), take("storage"), Cut(**options), calibration)
    with progress("pruning") as tell:
        report = prune(model, settings, out, tell=tell)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
        return
    for line in told(report):
        click.echo(line, err=True)
    click.echo(report.out)


def _refuse_idle(context: click.Context, cuts: bool) -> None:
    """Raise UsageError for options that mean nothing here."""
    for name in OF_ZEROS if cuts else OF_CUTS:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            what = "--sparsity" if cuts else "a cut, such as --blocks"
            raise UsageError(f"--{name} needs {what}.", f"Give {what}, or leave --{name} out.")
    method = context.params["method"]
    if not cuts and method == "magnitude":
        for name in ("calibration", "windows", "window", "seed"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError("magnitude measures nothing.", f"Leave --{name} out.")


def told(report: PruneReport) -> Iterator[str]:
    """The lines for people."""
    left, had = report.parameters / 1e6, report.parameters_before / 1e6
    yield f"{left:,.1f} of {had:,.1f} M parameters, {report.zeros:.1%} of them 0, {report.bytes / 1e6:,.1f} MB"
    if report.bytes < 0.99 * report.dense_bytes:
        yield f"with every zero stored: {report.dense_bytes / 1e6:,.1f} MB"
    if report.kl:
        yield "KL of removing block " + ", ".join(f"{block}: {kl:.3g}" for block, kl in report.kl.items())
    yield from report.notes
