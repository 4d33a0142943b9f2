"""`miaotui merge`: several models of one architecture into one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from miaotui.cli.progress import progress
from miaotui.errors import DependencyError, UsageError

METHODS = ["linear", "slerp", "ties", "dare", "task-arithmetic"]


@click.command("merge")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="linear",
    show_default=True,
    help="The last three add up what each model changed of its --base.",
)
@click.option(
    "--weights",
    metavar="W,W…",
    help="One for each model. slerp: their proportion says where between the two.  [default: equal, summing to 1]",
)
@click.option("--base", metavar="MODEL", help="The model that all were trained from (ties, dare, task-arithmetic).")
@click.option("--density", type=float, help="Share of each change that is kept.  [default: 0.2 for ties, 0.5 for dare]")
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="Multiply the merged change by this (with --base)."
)
@click.option("--seed", type=int, help="Of what dare drops.  [default: 0]")
@click.option(
    "-o", "--output", "out", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="The new folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(models: tuple[str, ...], weights: str | None, out: Path, as_json: bool, **options: Any) -> None:
    """Merge models of one architecture, tensor by tensor, and print the new folder.

    They must be safetensors that are not quantised, with the same shapes and the same tokenizer. Configuration and
    tokenizer are those of the base, or of the first model.
    """
    numbers = None if weights is None else split_numbers(weights, "--weights")
    if options["seed"] is None:
        options["seed"] = 0
    elif options["method"] != "dare":
        raise UsageError(f"{options['method']} draws nothing.", "Leave --seed out.")
    try:
        from miaotui.compress.merge import MergeSettings, merge
    except ImportError as error:
        raise needs_torch(error) from error
    settings = MergeSettings(weights=numbers, **options)
    with progress("merging") as tell:
        report = merge(models, settings, out, tell=tell)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
        return
    told = f"{report.tensors} tensors, {report.parameters / 1e6:,.1f} M parameters, {report.bytes / 1e6:,.1f} MB"
    click.echo(told, err=True)
    click.echo(report.out)


def split_numbers(text: str, what: str) -> tuple[float, ...]:
    """`0.7,0.3` as numbers. Raises UsageError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{what} is {text!r:.60}.", "Give numbers with commas between them, such as 0.7,0.3."
        ) from error


def needs_torch(error: ImportError) -> DependencyError:
    """What to do where PyTorch is not there."""
    return DependencyError(
        f"This needs PyTorch, which is not installed ({error}).", "Install it: pip install 'miaotui[compress]'."
    )
