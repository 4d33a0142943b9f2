"""`miaotui evaluate`: perplexity, and what was lost against a reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from miaotui.cli.options import ENGINE, MODEL, split_names
from miaotui.cli.progress import progress

F = TypeVar("F", bound=Callable[..., Any])

DATA = [
    click.option(
        "--data", metavar="FILE",
        help="Text, JSON lines with text or messages, or - for stdin.  [default: the prose that Python carries]",
    ),
    click.option(
        "--window", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens that are read together."
    ),
    click.option("--stride", type=click.IntRange(min=1), help="Tokens between windows.  [default: the window]"),
    click.option("--max-windows", type=click.IntRange(min=1), help="Windows at most.  [default: all of the data]"),
]  # fmt: skip
RUN = [ENGINE[name] for name in ("compute", "kv_cache_dtype", "threads", "device")]


def quality_options(function: F) -> F:
    """Add what `evaluate` and `compare` share to a command."""
    for option in reversed([*DATA, *RUN]):
        function = option(function)
    return function


@click.command("evaluate")
@MODEL
@quality_options
@click.option("--reference", metavar="ORIGINAL", help="Compare with this model, token by token.")
@click.option(
    "--reference-compute",
    type=click.Choice(["auto", "fp32"]),
    default="fp32",
    show_default=True,
    help="How ORIGINAL computes.",
)
@click.option(
    "--reference-kv-cache-dtype",
    type=click.Choice(["fp32", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="How ORIGINAL keeps keys and values.",
)
@click.option(
    "--agreement",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also count how many of N greedy tokens after a prompt are ORIGINAL's.",
)
@click.option(
    "--tasks",
    metavar="A,B,…",
    help="Measure these tasks instead: needle (retrieval from long texts, made here), or any of lm-eval's.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each of lm-eval's tasks at most.")
@click.option("--shots", type=click.IntRange(min=0), help="Examples in the prompt.  [default: as the task has it]")
@click.option(
    "--task-folder", type=click.Path(exists=True, file_okay=False), help="lm-eval tasks of your own, as YAML."
)
@click.option("--apply-chat-template", is_flag=True, help="Put lm-eval's questions as messages.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")  # fmt: skip
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str,
    data: str | None,
    reference: str | None,
    reference_compute: str,
    reference_kv_cache_dtype: str,
    agreement: int | None,
    tasks: str | None,
    limit: int | None,
    shots: int | None,
    task_folder: str | None,
    apply_chat_template: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the quality of MODEL on a text: its perplexity, with what it cost against ORIGINAL.

    Intervals are of 95%, over windows. ORIGINAL is run exactly, unless its options say otherwise. With --tasks, tasks
    are scored instead, and compared example by example.
    """
    if reference is None:
        _refuse_alone(context)
    names = split_names(tasks, "--tasks")
    _refuse_mixed(context, names is not None)
    if names is not None:
        from miaotui.measure.tasks import Asked

        asked = Asked(tuple(names), limit, shots, task_folder, apply_chat_template)
        exact = (reference_compute, reference_kv_cache_dtype)
        _tasks(model, asked, take(options)[1], reference, exact, as_json=as_json)
        return
    from miaotui.measure.quality import Reference, evaluate

    cut, settings = take(options)
    against = None
    if reference is not None:
        exact = type(settings)(settings.device, reference_compute, reference_kv_cache_dtype, settings.threads)
        against = Reference(reference, exact, agreement or 0)
    with progress("evaluating") as tell:
        report = evaluate(model, data, cut=cut, settings=settings, reference=against, tell=tell)
    show(report, evaluation, as_json=as_json)


def _tasks(
    model: str, asked: Any, settings: Any, reference: str | None, exact: tuple[str, str], *, as_json: bool
) -> None:
    from miaotui.measure.tasks import evaluate

    against = None
    if reference is not None:
        against = (reference, type(settings)(settings.device, *exact, settings.threads))
    with progress("answering") as tell:
        report = evaluate(model, asked, settings, against, tell)
    show(report, tasks_told, as_json=as_json)


def tasks_told(report: dict[str, Any]) -> Iterator[str]:
    """The lines of a report on tasks."""
    for task in report["tasks"]:
        figure = line(f"{task['task']} {task['metric']}", task["score"], *_spread(task, "score"), ".4f")
        yield f"{figure}  of {task['examples']}"
        if "difference" in task:
            yield line("  reference", task["reference_score"], None, None, ".4f")
            difference = line("  difference", task["difference"], *_spread(task, "difference"), "+.4f")
            told = "" if task["p_value"] is None else f"  p = {task['p_value']:.2g}"
            yield f"{difference}{told}"


def _spread(task: dict[str, Any], name: str) -> tuple[float | None, list[float] | None]:
    return task[f"{name}_stderr"], task[f"{name}_interval"]


OF_TEXTS = ("data", "window", "stride", "max_windows", "agreement")
OF_TASKS = ("limit", "shots", "task_folder", "apply_chat_template")


def _refuse_mixed(context: click.Context, tasks: bool) -> None:
    """Options of texts beside --tasks, and of tasks without it."""
    for name in OF_TEXTS if tasks else OF_TASKS:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} is not for --tasks." if tasks else f"{flag} needs --tasks.")


def _refuse_alone(context: click.Context) -> None:
    """Options that only mean something beside --reference."""
    for name in ("agreement", "reference_compute", "reference_kv_cache_dtype"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} needs a --reference.")


def take(options: dict[str, Any]) -> tuple[Any, Any]:
    """The Cut and the Settings that `quality_options` gave."""
    from miaotui.measure.quality_data import Cut
    from miaotui.measure.scoring import Settings

    cut = Cut(options.pop("window"), options.pop("stride"), options.pop("max_windows"))
    return cut, Settings(**options)


def show(report: dict[str, Any], lines: Callable[[dict[str, Any]], Iterator[str]], *, as_json: bool) -> None:
    """Print a report, for people or as JSON; notes go to stderr."""
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    click.echo("\n".join(lines(report)))
    for note in report["notes"]:
        click.echo(f"note: {note}", err=True)


def evaluation(report: dict[str, Any]) -> Iterator[str]:
    """The lines of an evaluation."""
    yield on_what(report)
    yield line("perplexity", report["perplexity"], report["stderr"], report["perplexity_interval"], ".2f")
    if "reference" not in report:
        return
    reference = report["reference"]
    yield line("  reference", reference["perplexity"], reference["stderr"], reference["perplexity_interval"], ".2f")
    yield named(report, "  ratio", "perplexity_ratio", ".4f")
    yield named(report, "KL mean", "kl_mean", ".3g")
    yield named(report, "KL p99", "kl_p99", ".3g")
    yield named(report, "top-1 flips", "top1_flips", ".2%")
    if "greedy_agreement" in report:
        yield named(report, f"greedy, of {report['greedy_tokens']}", "greedy_agreement", ".1f")


def on_what(report: dict[str, Any]) -> str:
    """What was measured, in one line."""
    windows, size = report["windows"], report["settings"]["window"]
    return f"{report['tokens']:,} tokens in {windows} window{'s' * (windows != 1)} of {size}, from {report['data']}"


def named(report: dict[str, Any], label: str, name: str, form: str) -> str:
    return line(label, report[name], report[f"{name}_stderr"], report[f"{name}_interval"], form)


def line(label: str, value: float, stderr: float | None, interval: list[float] | None, form: str) -> str:
    """A figure with its standard error and its interval, where it has them."""
    text = f"{label:<16}{value:{form}}"
    if stderr is None or interval is None:
        return text
    return f"{text} ± {stderr:{form}}  (95%: {interval[0]:{form}} to {interval[1]:{form}})"
