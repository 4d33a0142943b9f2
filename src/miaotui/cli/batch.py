"""`miaotui batch`: a file of requests, answered at full width."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.load import as_served, load_for_chat
from miaotui.cli.options import TOOL_CALL_PARSER, engine_options, take_engine
from miaotui.errors import InterruptedWorkError, ResourceError, UsageError

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM
    from miaotui.offline.batch import Progress
    from miaotui.offline.cache import ResultCache
    from miaotui.offline.journal import Journal
    from miaotui.offline.source import Source
    from miaotui.serve.service import Service

_DECIDE = ("compute", "kv_cache_dtype", "max_model_len", "device")
"""The engine's options that answers depend on."""
_AUTO = {"compute": "auto", "kv_cache_dtype": "auto", "device": "auto"}
"""What they are where neither the user nor the artefact says anything."""
_NO_BOUND = 1 << 30


@dataclass(frozen=True)
class _Asked:
    """What the command line says, but for the files."""

    model: str
    names: tuple[str, ...]
    chat_template: str | None
    tool_call_parser: str | None
    cache: Path | None
    engine: dict[str, Any]
    resume: str
    """How to go on when it is stopped."""


@click.command("batch")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="What answers: a folder, a .gguf file, a hub name, or `demo`.")
@click.option(
    "--served-model-name", multiple=True, help="What the lines call the model. Can be given again.  [default: MODEL]"
)
@click.option("--chat-template", help="A Jinja file, or the template itself, instead of the model's own.")
@TOOL_CALL_PARSER
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep answers in this folder, and have other files answered from it too.",
)
@click.option("--unordered", is_flag=True, help="Write OUT as the answers came, not in IN's order.")
@click.option("--restart", is_flag=True, help="Throw away what an unfinished run has done.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
@engine_options
def command(
    source: Path,
    output: Path,
    model: str,
    served_model_name: tuple[str, ...],
    chat_template: str | None,
    tool_call_parser: str | None,
    cache: Path | None,
    unordered: bool,
    restart: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer the requests of IN, one a line, and write the answers to OUT.

    Lines are as in OpenAI's batch files: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": MODEL, "messages": [...]}}. A bad line becomes an error record, and the rest goes on. The same
    request with a temperature of 0 or a seed is answered once. OUT appears whole; until then OUT.journal keeps what is
    done, and after a crash or Ctrl-C the same command goes on from there.
    """
    from miaotui.offline.batch import Progress, journal_of, write_records
    from miaotui.offline.journal import Journal
    from miaotui.offline.source import look_at

    resume = "Run the command again" + (" without --restart" if restart else "") + " to go on."
    names = served_model_name or (model,)
    asked = _Asked(model, names, chat_template, tool_call_parser, cache, take_engine(options), resume)
    path = journal_of(output)
    _check_output(source, output, free=overwrite or (path.exists() and not restart))
    found = look_at(source)
    identity = _identity(asked)
    with Journal(path, {"input": found.sha256, **identity}, found.lines, restart=restart) as journal:
        if journal.done < found.lines:  # else an earlier run was killed while it wrote OUT
            _check_output(source, output, free=overwrite)
        begin = time.perf_counter()
        progress = Progress(found.lines, journal.done, journal.done, journal.failed)
        if progress.done < progress.total:
            progress = _answer(asked, found, journal, json.dumps(identity))
        seconds = time.perf_counter() - begin
        write_records(journal, output, in_order=not unordered)
        journal.remove()
    _report(_summary(progress, seconds), as_json)


def _check_output(source: Path, output: Path, *, free: bool) -> None:
    """`free`: a file that is there may be replaced."""
    if not output.parent.is_dir():
        raise UsageError(f"The folder {output.parent} is not there.", "Make it first.")
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", "Name a file for the answers.")
    if output.exists() and source.exists() and os.path.samefile(source, output):
        raise UsageError("IN and OUT are the same file.", "Name another file for the answers.")
    if output.exists() and not free:
        raise UsageError(f"{output} is there already.", "Choose another file, or give --overwrite.")


def _identity(asked: _Asked) -> dict[str, str]:
    """What decides the answers, by the words that a refusal uses for it."""
    from miaotui.checkpoint.resolve import open_checkpoint, resolve
    from miaotui.model.chat import read_template

    template = None if asked.chat_template is None else read_template(asked.chat_template)
    served = {**_AUTO, **as_served(asked.model, asked.engine)}
    told = {name: served[name] for name in _DECIDE if name in served}
    return {
        "model": open_checkpoint(resolve(asked.model)).fingerprint(),
        "model's name": json.dumps(asked.names),
        "chat template": json.dumps(template, sort_keys=True),
        "tool call parser": json.dumps(asked.tool_call_parser),
        "way to compute": json.dumps(told, sort_keys=True),
    }


def _answer(asked: _Asked, found: Source, journal: Journal, identity: str) -> Progress:
    from miaotui.offline.cache import ResultCache

    with ExitStack() as stack:
        cache = None if asked.cache is None else stack.enter_context(closing(ResultCache(asked.cache)))
        llm = load_for_chat(asked.model, asked.engine, asked.chat_template)
        tell = stack.enter_context(_bar(found.lines, journal.done))
        try:
            return asyncio.run(_run(llm, asked, found, journal, identity, cache, tell))
        except KeyboardInterrupt:
            cause = f"Stopped after {journal.done} of {found.lines} lines, which are kept."
            raise InterruptedWorkError(cause, asked.resume) from None


async def _run(
    llm: LLM,
    asked: _Asked,
    found: Source,
    journal: Journal,
    identity: str,
    cache: ResultCache | None,
    tell: Callable[[Progress], None],
) -> Progress:
    import miaotui
    from miaotui.offline.batch import Batch
    from miaotui.serve.service import Service
    from miaotui.serve.settings import ServeSettings

    settings = ServeSettings(
        served_model_names=asked.names, max_queue=_NO_BOUND, tool_call_parser=asked.tool_call_parser
    )
    service = Service(settings)
    service.attach(llm)
    width = 2 * llm.engine.config.max_num_seqs  # so that whoever ends is followed at once
    model = f"{miaotui.__version__} {identity}"
    try:
        return await Batch(found, journal, _until_failure(service, asked.resume), model, width, cache, tell).run()
    finally:
        service.close()


def _until_failure(service: Service, resume: str) -> Callable[[str, Mapping[str, Any]], Any]:
    """Answers as long as there is an engine: without one, no line may become an error record."""

    async def answer(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        status, answered = await service.answer(url, body)
        if status == 503:
            raise ResourceError("The engine has failed, as the log above says; what is done is kept.", resume)
        return status, answered

    return answer


def _summary(progress: Progress, seconds: float) -> dict[str, Any]:
    return {
        "lines": progress.total,
        "resumed": progress.before,
        "failed": progress.failed,
        "reused": progress.reused,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "seconds": round(seconds, 3),
        "output_tokens_per_second": round(progress.completion_tokens / seconds, 1),
    }


def _report(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
        return
    text = f"{summary['lines']:,} lines, {summary['failed']:,} of them errors"
    if summary["completion_tokens"]:
        text += f"; {summary['completion_tokens']:,} tokens at {summary['output_tokens_per_second']:,.0f} a second"
    if summary["reused"]:
        text += f"; {summary['reused']:,} had been asked before"
    click.echo(text, err=True)


@contextmanager
def _bar(total: int, before: int) -> Iterator[Callable[[Progress], None]]:
    """A bar with tokens a second and the time left, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("batch", total=total, completed=before, rate="")
        begin = time.perf_counter()

        def tell(progress: Progress) -> None:
            rate = progress.completion_tokens / (time.perf_counter() - begin)
            bar.update(task, completed=progress.done, rate=f"{rate:,.0f} tokens/s")

        yield tell
