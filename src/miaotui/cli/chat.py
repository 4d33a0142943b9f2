"""`miaotui chat`: a conversation in the terminal. Ctrl-C stops an answer; Ctrl-D or /exit ends the conversation."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.load import load
from miaotui.cli.options import MODEL, engine_options, sampling_options, sampling_params, take_engine
from miaotui.cli.text import argument
from miaotui.errors import MiaotuiError, UsageError

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM
    from miaotui.engine.params import SamplingParams

HELP = """\
/reset         forget the conversation (the system prompt stays)
/system TEXT   set the system prompt and start over; without TEXT, show it
/save FILE     write the conversation as JSON
/help          this list
/exit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


@click.command("chat")
@MODEL
@click.option("--system", help="What the model is told before the conversation.")
@sampling_options
@engine_options
def command(model: str, system: str | None, **options: Any) -> None:
    """Talk with MODEL. /help lists what can be typed besides questions."""
    params = sampling_params(options)
    told = None if system is None else argument(system, "--system")
    with load(model, take_engine(options)) as llm:
        Conversation(llm, params, model, told).talk()


class Conversation:
    """The messages so far, and what is done with a line that the user types."""

    def __init__(self, llm: LLM, params: SamplingParams, model: str, system: str | None = None) -> None:
        self.llm, self.params, self.model = llm, params, model
        self.system = system
        self.messages: list[dict[str, str]] = []

    def talk(self) -> None:
        """Read and answer until the input ends or /exit."""
        if sys.stdin.isatty():
            click.echo(f"{self.model} is ready. /help lists commands.", err=True)
        with _line_editing():
            for line in _lines():
                if not self.handle(line.strip()):
                    return

    def handle(self, line: str) -> bool:
        """Do what a line asks; False to leave. What the user can mend is said, not raised."""
        try:
            if line.startswith("/"):
                return self._obey(*line.split(maxsplit=1))
            if line:
                self.answer(line)
        except MiaotuiError as error:
            click.echo(f"error: {error.message}\n{error.hint}", err=True)
        return True

    def answer(self, question: str) -> None:
        """Stream the answer to stdout. Stopped by Ctrl-C, what was said counts; after an error, nothing does."""
        asked = [*self.messages, {"role": "user", "content": question}]
        told = [{"role": "system", "content": self.system}] if self.system else []
        said: list[str] = []
        stream = self.llm.stream_chat([*told, *asked], self.params)
        try:
            for output in stream:
                said.append(output.outputs[0].text)
                sys.stdout.write(said[-1])
                sys.stdout.flush()
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False, err=True)
        finally:
            stream.close()
            if said:
                sys.stdout.write("\n")
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    def _obey(self, name: str, text: str = "") -> bool:
        """Carry out a slash command; False for /exit."""
        match name:
            case "/exit" | "/quit":
                return False
            case "/help":
                click.echo(HELP, err=True)
            case "/reset":
                self.messages = []
            case "/system" if not text:
                click.echo(self.system or "There is no system prompt.", err=True)
            case "/system":
                self.system, self.messages = text, []
            case "/save":
                self._save(text)
            case _:
                raise UsageError(f"There is no command {name}.", "/help lists them.")
        return True

    def _save(self, filename: str) -> None:
        if not filename:
            raise UsageError("/save needs a file.", "Type for example /save talk.json.")
        told = [{"role": "system", "content": self.system}] if self.system else []
        text = json.dumps({"model": self.model, "messages": [*told, *self.messages]}, ensure_ascii=False, indent=2)
        path = Path(filename).expanduser()
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from error
        click.echo(f"saved {len(self.messages)} messages to {path}", err=True)


def _lines() -> Iterator[str]:
    """What the user types, until the end of input. Ctrl-C drops the line that is being typed."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            yield input(">>> ") if terminal else input()
        except EOFError:
            if terminal:
                click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n/exit or Ctrl-D leaves", err=True)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history that lasts, where Python has readline and there is a terminal."""
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    from miaotui.checkpoint.demo import cache_folder

    path = cache_folder() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
