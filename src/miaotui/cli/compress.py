"""`miaotui compress`: a model in fewer bits, by a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.compress.progress import Progress
    from miaotui.compress.recipe import Recipe
    from miaotui.compress.run import Report

PROMPT = "The capital of France is"
"""What every artefact is asked once it is written."""


@click.command("compress")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "out",
    metavar="PATH",
    required=True,
    type=click.Path(path_type=Path),
    help="The new folder, or a file that ends in .gguf.",
)
@click.option(
    "--recipe",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A recipe as YAML, or an artefact's folder; what else is given changes it.",
)
@click.option(
    "--scheme",
    metavar="SCHEME",
    help="w4g64-sym, w8-sym, w3g64-asym, w8a8, w4a8g64, fp8, or q4_0.  [default: w4g64-sym]",
)
@click.option(
    "--method",
    metavar="METHOD",
    help="rtn, gptq, hqq or fp8, with rotate+, smooth+ or awq+ before and +qat or +scales behind.  [default: gptq]",
)
@click.option(
    "--option", "options", metavar="STEP.KEY=VALUE", multiple=True, help="A step's setting: gptq.damping=0.02."
)
@click.option(
    "--override",
    "overrides",
    metavar="PATTERN=SCHEME",
    multiple=True,
    help="Linears by name: '*.mlp.down_proj=w8g64-sym'.",
)
@click.option("--embedding", metavar="SCHEME", help="Of the table of tokens; with it a tied head.  [default: keep]")
@click.option("--head", metavar="SCHEME", help="Of the head, where it is not the embedding.  [default: keep]")
@click.option(
    "--kv-cache",
    "kv_cache",
    type=click.Choice(["none", "int8", "fp8"]),
    help="Scales for a cache in these codes.  [default: none]",
)
@click.option("--propagate", is_flag=True, help="Calibrate each layer on what the compressed layers before it give.")
@click.option(
    "--calibration",
    "source",
    metavar="SOURCE",
    help="Text, JSON lines or Parquet; self: what the model writes.  [default: the prose that Python carries]",
)
@click.option("--windows", type=int, help="How many runs of text.  [default: 64]")
@click.option("--window", type=int, help="Tokens of each.  [default: 512]")
@click.option("--seed", type=int, help="Of what is drawn.  [default: 0]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the text runs when it is calibrated on.",
)
@click.option("--restart", is_flag=True, help="Do not go on with what an interrupted run left.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")  # fmt: skip
def command(model: str, out: Path, device: str, restart: bool, as_json: bool, **given: Any) -> None:
    """Write MODEL in fewer bits, and print where.

    The result loads in miaotui, vLLM and transformers (a folder) or llama.cpp (a .gguf file). It is read back and
    compared before it appears, and its recipe lies beside it. A run that was ended goes on where it was.
    """
    try:
        from miaotui.compress.run import compress
    except ImportError as error:
        from miaotui.cli.merge import needs_torch

        raise needs_torch(error) from error
    from miaotui.cli.self_text import self_text

    recipe = recipe_of(out, **given)
    written = self_text(model, shown=sys.stderr.isatty(), tell=lambda line: click.echo(line, err=True))
    with shown() as tell:
        report = compress(
            model, recipe, out, device=device, resume=not restart, tell=tell, answer=_answer, write=written
        )
    if as_json:
        click.echo(json.dumps(report.plain(), ensure_ascii=False))
        return
    click.echo(summary(report), err=True)
    click.echo(report.path)


def recipe_of(
    out: Path,
    *,
    file: Path | None,
    options: tuple[str, ...],
    overrides: tuple[str, ...],
    source: str | None,
    propagate: bool,
    **given: Any,
) -> Recipe:
    """The recipe that a file and options make. Raises UsageError for what is none."""
    from miaotui.compress.recipe import Recipe

    values: dict[str, Any] = {} if file is None else Recipe.read(file).plain()
    calibration = dict(values.get("calibration", {}))
    calibration |= {name: given.pop(name) for name in ("windows", "window", "seed") if given[name] is not None}
    if source is not None:
        calibration["source"] = source
    for name in ("windows", "window", "seed"):
        given.pop(name, None)
    values |= {name: value for name, value in given.items() if value is not None}
    values["calibration"] = calibration
    if propagate:
        values["propagate"] = True
    if out.suffix == ".gguf":
        values = {"scheme": "q4_0", **values, "format": "gguf"}
    if values.get("scheme", "").startswith("fp8") and given.get("method") is None:
        values["method"] = "fp8"
    if overrides:
        values["overrides"] = [_pair(text, "--override", ("match", "scheme")) for text in overrides]
    for text in options:
        name, value = _pair(text, "--option", ("name", "value")).values()
        step, _, key = name.partition(".")
        values.setdefault("options", {}).setdefault(step, {})[key] = _plain(value)
    return Recipe.parse(values)


def _pair(text: str, flag: str, names: tuple[str, str]) -> dict[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"{flag} is {text!r:.60}.", "Write a name, an equals sign and a value.")
    return {names[0]: name, names[1]: value}


def _plain(text: str) -> Any:
    """A number or a truth value where it is one, as YAML reads it."""
    import yaml

    value = yaml.safe_load(text)
    return text if isinstance(value, (dict, list)) else value


def _answer(path: Path) -> str:
    """What the artefact says, through the engine that will serve it."""
    from miaotui.cli.load import load
    from miaotui.engine.params import SamplingParams

    with load(str(path), {"max_model_len": 64}) as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    return PROMPT + output.outputs[0].text


def summary(report: Report) -> str:
    """A few lines for people."""
    ratio = report.source_bytes / report.bytes
    lines = [
        f"{report.source_bytes / 1e6:,.1f} MB → {report.bytes / 1e6:,.1f} MB ({ratio:.2f}× smaller)"
        f" in {sum(report.seconds.values()):.0f} s, read back and compared"
    ]
    errors = [error for layer, found in report.errors.items() if layer >= 0 for error in found.values()]
    if errors:
        worst = max((error, layer, name) for layer, found in report.errors.items() for name, error in found.items())
        lines.append(
            f"error of a linear's output: {sum(errors) / len(errors):.3%} on average, {worst[0]:.3%} at most"
            f" ({worst[2]}" + (f" of layer {worst[1]})" if worst[1] >= 0 else ")")
        )
    faults = (report.calibration or {}).get("faults", [])
    lines += [f"calibration: {fault}" for fault in faults]
    if report.divergence is not None:
        before, after = (report.divergence[when] for when in ("before", "after"))
        lines.append(f"KL to the original, on windows that were not trained on: {before:.4f} → {after:.4f}")
    lines.append(f"it says: {report.answer!r}")
    return "\n".join(lines)


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: a bar at a terminal, else a line for each stage."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(progress: Progress) -> None:
            if progress.note is not None:
                bars.console.print(f"{progress.stage}: {progress.note}", highlight=False)
            if progress.total > 1:
                if progress.stage not in tasks:
                    for task in tasks.values():
                        bars.update(task, visible=False)
                    tasks[progress.stage] = bars.add_task(STAGES[progress.stage], total=progress.total, said="")
                bars.update(tasks[progress.stage], completed=progress.done, said=_said(progress))

        yield tell


STAGES = {
    "preflight": "looking at one layer", "calibrate": "calibrating", "sensitivity": "measuring sensitivity",
    "solve": "solving", "teach": "asking the original", "train": "training", "write": "writing",
    "verify": "reading back",
}  # fmt: skip


class _Lines:
    """A line when a stage begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        if progress.note is not None:
            click.echo(f"{progress.stage}: {progress.note}", err=True)
        elif progress.stage != self._stage:
            click.echo(f"{STAGES[progress.stage]} …", err=True)
        self._stage = progress.stage


def _said(progress: Progress) -> str:
    parts = [] if progress.error is None else [f"error {progress.error:.3%}"]
    if progress.left is not None and progress.done < progress.total:
        parts.append(f"{progress.left:.0f} s left")
    return ", ".join(parts)
