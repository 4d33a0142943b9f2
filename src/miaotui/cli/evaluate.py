"""`miaotui evaluate`: perplexity, and what was lost against a reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from miaotui.cli.options import ENGINE, MODEL
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
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the quality of MODEL on a text: its perplexity, with what it cost against ORIGINAL.

    Intervals are of 95%, over windows. ORIGINAL is run exactly, unless its options say otherwise.
    """
    if reference is None:
        _refuse_alone(context)
    from miaotui.measure.quality import Reference, evaluate

    cut, settings = take(options)
    against = None
    if reference is not None:
        exact = type(settings)(settings.device, reference_compute, reference_kv_cache_dtype, settings.threads)
        against = Reference(reference, exact, agreement or 0)
    with progress("evaluating") as tell:
        report = evaluate(model, data, cut=cut, settings=settings, reference=against, tell=tell)
    show(report, evaluation, as_json=as_json)


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
