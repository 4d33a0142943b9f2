"""`miaotui card`: what was measured of an artefact."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command("card")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT",
    help="Write the report with its charts to this file; it needs nothing but itself.",
)  # fmt: skip
def command(artefact: Path, as_json: bool, html: Path | None) -> None:
    """Show what was measured of ARTEFACT when it was made, against its original.

    ARTEFACT is a folder or a .gguf file that `miaotui accelerate` has written, or a card.json.
    """
    from miaotui.accelerate.card.files import read

    card = read(artefact)
    if html is not None:
        from miaotui.accelerate.card.report import save

        save(card, html)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(json.dumps(card.plain(), ensure_ascii=False, indent=2))
    elif html is None:
        from rich.console import Console

        from miaotui.accelerate.card.terminal import shown

        Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(shown(card))
