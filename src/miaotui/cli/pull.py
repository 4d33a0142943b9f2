"""`miaotui pull`: a model onto this machine, so that it can be used without a network."""

from __future__ import annotations

import json

import click

from miaotui.cli.options import MODEL


@click.command("pull")
@MODEL
@click.option("--json", "as_json", is_flag=True, help="Print the place, format and size as JSON.")
def command(model: str, as_json: bool) -> None:
    """Fetch MODEL and print where it lies.

    A download that was stopped goes on where it stopped. What is there already is only checked.
    """
    from miaotui.checkpoint import open_checkpoint, resolve

    path = resolve(model)
    checkpoint = open_checkpoint(path)
    if as_json:
        found = {"model": model, "path": str(path), "format": checkpoint.format, "bytes": checkpoint.nbytes}
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    click.echo(f"{model}: {checkpoint.format}, {checkpoint.nbytes / 1e6:.1f} MB", err=True)
    click.echo(path)
