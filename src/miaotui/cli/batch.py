"""`miaotui batch`: a file of requests, answered at full width."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.load import load_for_chat
from miaotui.cli.options import engine_options, take_engine
from miaotui.errors import InterruptedWorkError, UsageError

if TYPE_CHECKING:
    from miaotui.offline.batch import Progress


@click.command("batch")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="What answers: a folder, a .gguf file, a hub name, or `demo`.")
@click.option("--served-model-name", multiple=True, help="What the lines call the model.  [default: MODEL]")
@click.option("--chat-template", help="A Jinja file, or the template itself, instead of the model's own.")
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Keep answers here; the same is asked once."
)
@click.option("--restart", is_flag=True, help="Throw away what an unfinished run has done.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
@engine_options
def command(
    source: Path, output: Path, model: str, restart: bool, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Answer the requests of IN, one a line, and write the answers to OUT.

    Lines are as in OpenAI's batch files: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": MODEL, "messages": [...]}}. A bad line becomes an error record. OUT appears whole, in IN's order;
    until then OUT.journal keeps what is done, and the same command goes on from there.
    """
    from miaotui.offline.batch import journal_of, look_at, write_records
    from miaotui.offline.journal import Journal

    if output.exists() and not overwrite:
        raise UsageError(f"{output} is there already.", "Choose another file, or give --overwrite.")
    if not output.parent.is_dir():
        raise UsageError(f"The folder {output.parent} is not there.", "Make it first.")
    found = look_at(source)
    engine = take_engine(options)
    if restart:
        journal_of(output).unlink(missing_ok=True)
    names = tuple(options["served_model_name"]) or (model,)
    identity = _identity(model, engine, options["chat_template"])
    fingerprint = {"input": found.sha256, "model": identity, "model's name": json.dumps(names)}
    with Journal(journal_of(output), fingerprint, found.lines) as journal:
        begin = time.perf_counter()
        if journal.done < found.lines:
            progress = _answer(model, engine, names, options, found, journal, identity)
            summary = _summary(progress, time.perf_counter() - begin)
        else:
            summary = {"lines": found.lines, "resumed": found.lines, "failed": 0, "seconds": 0.0}
        summary["lines"], summary["failed"] = write_records(journal, output)
        journal.remove()
    _report(summary, as_json)


def _answer(
    model: str,
    engine: dict[str, Any],
    names: tuple[str, ...],
    options: dict[str, Any],
    found: Any,
    journal: Any,
    identity: str,
) -> Progress:
    from miaotui.offline.batch import Batch
    from miaotui.offline.cache import ResultCache
    from miaotui.serve.service import Service
    from miaotui.serve.settings import ServeSettings

    with ExitStack() as stack:
        cache = None if options["cache"] is None else stack.enter_context(closing(ResultCache(options["cache"])))
        tell = stack.enter_context(_bar())
        llm = load_for_chat(model, engine, options["chat_template"])
        width = 2 * llm.engine.config.max_num_seqs  # so that whoever ends is followed at once
        settings = ServeSettings(served_model_names=names, max_queue=8 * width, request_timeout=None)

        async def run() -> Progress:
            service = Service(settings)
            service.attach(llm)
            try:
                return await Batch(found, journal, service.answer, identity, width, cache, tell).run()
            finally:
                service.close()

        try:
            return asyncio.run(run())
        except KeyboardInterrupt:
            cause = f"Stopped after {journal.done} of {found.lines} lines, which are kept."
            raise InterruptedWorkError(cause, "Run the same command again to go on.") from None


def _identity(model: str, engine: dict[str, Any], chat_template: str | None) -> str:
    """What decides the answers: the model's files, how it computes, and its template."""
    from miaotui.checkpoint.resolve import open_checkpoint, resolve
    from miaotui.model.chat import read_template

    template = "" if chat_template is None else read_template(chat_template)
    told = {name: engine[name] for name in ("compute", "kv_cache_dtype", "max_model_len", "device") if name in engine}
    return json.dumps([open_checkpoint(resolve(model)).fingerprint(), told, template], sort_keys=True, default=str)


def _summary(progress: Progress, seconds: float) -> dict[str, Any]:
    return {
        "lines": progress.total,
        "resumed": progress.before,
        "failed": progress.failed,
        "from_cache": progress.from_cache,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "seconds": round(seconds, 3),
        "output_tokens_per_second": round(progress.completion_tokens / seconds, 1),
    }


def _report(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
        return
    text = f"{summary['lines']} lines, {summary['failed']} of them errors"
    if summary.get("completion_tokens"):
        text += f"; {summary['completion_tokens']} tokens at {summary['output_tokens_per_second']:,.0f} a second"
    if summary.get("from_cache"):
        text += f"; {summary['from_cache']} from the cache"
    click.echo(text, err=True)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A bar with tokens a second and the time left, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("batch", total=None, rate="")
        begin = time.perf_counter()

        def tell(progress: Progress) -> None:
            rate = progress.completion_tokens / (time.perf_counter() - begin)
            bar.update(task, completed=progress.done, total=progress.total, rate=f"{rate:,.0f} tokens/s")

        yield tell
