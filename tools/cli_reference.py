"""Write docs/cli.md from the commands themselves: `python tools/cli_reference.py`.

A test compares the file with what this makes, so that no option can be added, changed or dropped unsaid.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import click  # noqa: E402

from miaotui.cli.main import COMMANDS, program  # noqa: E402

HEAD = """\
# The command line

Written by `tools/cli_reference.py` from the commands themselves; do not edit.

`MODEL` is a folder with safetensors, a `.gguf` file, a hub name (`org/name`, `org/name@revision`,
`org/name:file.gguf`), or `demo`; `dummy:q4_0:config.json` stands for random weights of those shapes, to measure with.
Results go to stdout and everything else to stderr.

| Exit status | |
|---|---|
| 0 | done |
| 1 | failed: the model, the machine or a file; the message says what to do |
| 2 | bad usage: an argument that cannot mean anything |
| 130 | interrupted with Ctrl-C |

| Environment | |
|---|---|
| `MIAOTUI_HOME` | what Miaotui downloads and remembers; `~/.cache/miaotui` |
| `MIAOTUI_ISA` | the best kernels to use, of `avx512bf16`, `avx512`, `avxvnni`, `avx2`, `portable`; the best that run |
| `MIAOTUI_API_KEY` | a key that `miaotui serve` asks for, kept out of the list of processes |
| `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` | the hub's cache, its login, and whether it may be asked at all |
"""


def commands() -> Iterator[click.Command]:
    """Every command, in the table's order."""
    context = click.Context(program)
    for name in COMMANDS:
        command = program.get_command(context, name)
        assert command is not None
        yield command


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in commands():
        parts += [f"## miaotui {command.name}", COMMANDS[str(command.name)], f"`{usage(command)}`"]
        parts += [_prose(command), *(_group(command) if isinstance(command, click.Group) else _options(command))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def usage(command: click.Command, before: str = "miaotui") -> str:
    """How it is called, such as `miaotui run [OPTIONS] MODEL [PROMPT]`."""
    context = click.Context(command, info_name=f"{before} {command.name}")
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def options(command: click.Command) -> list[click.Option]:
    """Its own options; every command has --help too."""
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def _group(group: click.Group) -> Iterator[str]:
    """The commands of a command."""
    for command in group.commands.values():
        yield f"### miaotui {group.name} {command.name}"
        yield f"`{usage(command, f'miaotui {group.name}')}`"
        yield _prose(command)
        yield from _options(command)


def _options(command: click.Command) -> Iterator[str]:
    yield "\n".join(_table(command))


def _prose(command: click.Command) -> str:
    paragraphs = (command.help or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _table(command: click.Command) -> Iterator[str]:
    yield "| Option | Value | Default | |"
    yield "|---|---|---|---|"
    for option in options(command):
        said, default = _said(option)
        spelled = ", ".join(f"`{name}`" for name in option.opts)
        yield "| " + " | ".join((spelled, _value(option), default, said.replace("|", "\\|"))) + " |"


def _said(option: click.Option) -> tuple[str, str]:
    """The help text and the default, which stands at the text's end where it is not a value."""
    match = re.fullmatch(r"(.*?)\s*(?:\[default: (.*)\])?", option.help or "", flags=re.DOTALL)
    assert match is not None
    if match[2] is not None:
        return match[1], match[2]
    return match[1], f"`{option.default}`" if option.show_default else ""


def _value(option: click.Option) -> str:
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    return (option.metavar or option.type.name.removesuffix(" range")).replace("|", " or ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
