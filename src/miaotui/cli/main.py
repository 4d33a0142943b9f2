"""The command line: a table of commands, each a module that is imported when it is called.

Results go to stdout and everything else to stderr. Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

import miaotui
from miaotui.errors import MiaotuiError

COMMANDS = {
    "run": "Answer one prompt.",
    "chat": "Talk with a model.",
    "serve": "Serve a model to OpenAI clients.",
    "batch": "Answer a file of requests.",
    "keys": "Make, list and revoke API keys for serve.",
    "pull": "Fetch a model, so that it can be used offline.",
    "bench": "Measure speed by regime, beside this machine's ceilings.",
    "bench serve": "Measure how a server answers under load.",
    "evaluate": "Measure quality on a text: perplexity, and what was lost against a reference.",
    "compare": "Tell two models apart on the same text.",
    "accelerate": "Find the fastest form of a model that keeps its quality, and prove both.",
    "prune": "Cut what matters least out of a model, or set weights to 0.",
    "card": "Show what was measured of a model that accelerate has made.",
    "distill": "Train a smaller model to say what a larger one says.",
    "compress": "Write a model in fewer bits, by a recipe.",
    "merge": "Merge models of one architecture into one.",
    "doctor": "Look at this machine, and whether a model fits it.",
}


class LazyGroup(click.Group):
    """Lists COMMANDS without importing them; `miaotui.cli.<name>` has the command under the name `command`.

    A name of two words is a command beside the one of its first word, which takes any other second word.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"miaotui.cli.{cmd_name.replace(' ', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        both = " ".join(args[:2])
        return super().resolve_command(ctx, [both, *args[2:]] if both in COMMANDS else args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(miaotui.__version__, prog_name="miaotui")
def program() -> None:
    """Miaotui (秒推): language models answered from the machine you have.

    MODEL is a folder, a .gguf file, a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct, or `demo`.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. `arguments` defaults to the process's own."""
    if not _prepare_streams():
        click.echo("error: stdout is closed.\nSend it to a file, or to /dev/null.", err=True)
        return 1
    try:
        _invoke(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as leaving:  # --help and --version
        return leaving.exit_code
    except MiaotuiError as error:
        click.echo(f"error: {error.message}\n{error.hint}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted", err=True)
        return 130
    except BrokenPipeError:
        _discard_stdout()  # the reader has had enough (`| head`)
        return 0
    except MemoryError:
        click.echo("error: Memory ran out.\nTake a smaller model, or a smaller --max-model-len.", err=True)
        return 1
    except OSError as error:
        _discard_stdout()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = (
            "Free some space, or write somewhere else." if full else "Check that file or device, and its permissions."
        )
        click.echo(f"error: {error.filename or 'The output'}: {error.strerror or error}.\n{hint}", err=True)
        return 1


def _prepare_streams() -> bool:
    """Make streams that lose nothing to a locale; False when there is no stdout.

    Bytes of file names that are not UTF-8 pass through; a narrower encoding gets `?` for what it lacks.
    """
    if sys.stdout is None:
        return False
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "replace")
    return True


def _discard_stdout() -> None:
    """What stdout still holds goes nowhere: Python would complain when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _invoke(arguments: list[str]) -> None:
    """Run without click's own `main`, which would end the process and take broken pipes for failures."""
    with program.make_context("miaotui", arguments) as context:
        program.invoke(context)


if __name__ == "__main__":
    sys.exit(main())
