"""`miaotui keys`: a file of API keys for `miaotui serve --api-keys-file`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.serve.auth import Key

FILE = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("keys.json"),
    show_default=True,
    help="The keys file.",
)
_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Span(click.ParamType[float]):
    """A length of time such as 12h or 30d, as seconds."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+)([mhdw])", str(value))
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is no length of time. Write 30m, 12h, 30d or 8w.", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


@click.group("keys")
def command() -> None:
    """Make, list and revoke API keys.

    The file holds hashes: a key is shown once, when it is made. A server notices changes by itself.
    """


@command.command("create")
@click.argument("name")
@FILE
@click.option("--expires-in", type=Span(), help="How long it is good for, such as 12h or 30d.  [default: for ever]")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="How often it may ask.  [default: no limit]")
def create(name: str, path: Path, expires_in: float | None, requests_per_minute: int | None) -> None:
    """Make a key called NAME, and print it."""
    from miaotui.serve.auth import Key, check_name, digest, editing, new_secret, write_keys

    check_name(name)
    secret, now = new_secret(), time.time()
    expires = None if expires_in is None else now + expires_in
    with editing(path):
        keys = _known(path)
        if any(key.name == name for key in keys):
            raise UsageError(f"There is a key {name!r} in {path} already.", "Choose another name, or revoke it first.")
        write_keys(path, [*keys, Key(name, digest(secret), now, expires, requests_per_minute)])
    click.echo(secret)
    click.echo(f"Written to {path} as a hash: this is the only time the key is shown.", err=True)


@command.command("list")
@FILE
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON; times are in seconds since 1970.")
def show(path: Path, as_json: bool) -> None:
    """List the keys' names, with their bounds."""
    from miaotui.serve.auth import read_keys

    keys = read_keys(path)
    if as_json:
        fields = ("name", "created", "expires", "requests_per_minute")
        listed = [{name: getattr(key, name) for name in fields} | {"expired": _expired(key)} for key in keys]
        click.echo(json.dumps(listed, ensure_ascii=False))
        return
    for key in keys:
        until = (
            "for ever" if key.expires is None else time.strftime("until %Y-%m-%d %H:%M", time.localtime(key.expires))
        )
        ended = " (expired)" if _expired(key) else ""
        often = "" if key.requests_per_minute is None else f", {key.requests_per_minute} requests a minute"
        click.echo(f"{key.name}: {until}{ended}{often}")


@command.command("revoke")
@click.argument("name")
@FILE
def revoke(name: str, path: Path) -> None:
    """Take the key called NAME out of the file."""
    from miaotui.serve.auth import editing, read_keys, write_keys

    with editing(path):
        keys = read_keys(path)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise UsageError(f"There is no key {name!r} in {path}.", f"Those there are: {known}.")
        write_keys(path, left)
    click.echo(f"{name} is revoked.", err=True)


def _expired(key: Key) -> bool:
    return key.expired(time.time())


def _known(path: Path) -> list[Key]:
    from miaotui.serve.auth import read_keys

    return read_keys(path) if path.exists() else []
