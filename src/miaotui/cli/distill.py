"""`miaotui distill`: train a smaller model to say what a larger one says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from miaotui.cli.merge import needs_torch
from miaotui.cli.options import split_names
from miaotui.cli.progress import progress
from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.compress.train.distil import Request
    from miaotui.compress.train.settings import Settings, Task

F = TypeVar("F", bound=Callable[..., Any])

COUNT = click.IntRange(min=1)
SHARE = click.FloatRange(0, 1)

LOSS = [
    click.option(
        "--kl", type=float, help="Weight of KL(teacher ‖ student) of the next token.  [default: 1; 0 from scratch]"
    ),
    click.option("--ce", type=float, help="Weight of the text's own next token.  [default: 0; 1 from scratch]"),
    click.option("--hidden", type=float, default=0.0, show_default=True, help="Weight of hidden states' distance."),
    click.option("--temperature", type=float, default=1.0, show_default=True, help="Divides logits for --kl."),
    click.option("--top", type=COUNT, help="Tell only the teacher's N likeliest tokens apart.  [default: all]"),
    click.option(
        "--on-policy", type=SHARE, default=0.0, show_default=True, help="Share of windows that the student writes."
    ),
    click.option(
        "--on-policy-every", type=COUNT, default=50, show_default=True, help="Steps after which it writes new ones."
    ),
]
TEXT = [
    click.option(
        "--data", "data", multiple=True, metavar="FILE[=WEIGHT]",
        help="Text, JSON lines, Parquet, or a folder of these; several are mixed by weight."
        "  [default: the prose that Python carries]",
    ),
    click.option("--window", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens read together."),
    click.option(
        "--held-out", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True,
        help="Share of the windows to judge by (64 of each text at most).",
    ),
    click.option("--evaluate-every", type=COUNT, default=50, show_default=True, help="Steps between judgements."),
    click.option("--patience", type=COUNT, help="Stop after so many judgements without a better one."),
]  # fmt: skip
DESCENT = [
    click.option("--steps", type=COUNT, default=500, show_default=True, help="Steps of the optimiser, AdamW."),
    click.option("--batch", type=COUNT, default=8, show_default=True, help="Windows a step, over all processes."),
    click.option("--micro-batch", type=COUNT, help="Windows at once; the rest is accumulated.  [default: all]"),
    click.option("--rate", type=float, default=3e-4, show_default=True, help="Learning rate after the warm-up."),
    click.option("--warmup", type=click.IntRange(min=0), default=20, show_default=True, help="Steps of warm-up."),
    click.option(
        "--schedule", type=click.Choice(["cosine", "plateau"]), default="cosine", show_default=True,
        help="Then: a cosine to a tenth, or halved where judgements get no better.",
    ),
    click.option("--clip", type=float, default=1.0, show_default=True, help="Largest norm of the gradient."),
    click.option("--weight-decay", type=float, default=0.0, show_default=True, help="Of matrices."),
    click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same windows, same start."),
    click.option(
        "--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True,
        help="Of products; everything else is float32. auto: bf16 where the machine multiplies it itself.",
    ),
    click.option("--recompute", is_flag=True, help="Compute layers again for the gradient: less memory, more time."),
    click.option("--save-every", type=COUNT, default=100, show_default=True, help="Steps between checkpoints."),
    click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to train."
    ),
]  # fmt: skip
LORA = [
    click.option("--lora", type=COUNT, metavar="RANK", help="Train low-rank additions, merged when written."),
    click.option("--lora-alpha", type=float, help="They are multiplied by ALPHA / RANK.  [default: twice the rank]"),
    click.option("--lora-targets", metavar="PATTERN,…", help="Linears that get one, such as *.q_proj.  [default: all]"),
]
PRIVACY = [
    click.option("--dp-epsilon", type=float, help="Differential privacy of each window, by Opacus: ε at the end."),
    click.option("--dp-delta", type=float, help="Its δ, below 1 / the windows of the text."),
]


def _with(*groups: list[Any]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return add


@click.command("distill")
@click.argument("teacher", required=False)
@click.option(
    "--student",
    required=True,
    metavar="MODEL|CONFIG|SHAPE",
    help="A model (a pruned one; a compressed-tensors folder stays in its codes), a config.json, or changes of the "
    "teacher's, such as layers=6,hidden=384.",
)
@click.option("--from-scratch", is_flag=True, help="No teacher: learn the text's next token.")
@click.option("--tokenizer", metavar="FOLDER", help="Of a config.json from scratch.  [default: beside it]")
@click.option("--scheme", help="Train linears as these codes, and write them so: w4g64-sym.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of the written weights.  [default: as the student's]",
)
@_with(TEXT, LOSS, DESCENT, LORA, PRIVACY)
@click.option(
    "-o", "--output", "out", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="The new folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    teacher: str | None, from_scratch: bool, out: Path, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Train a student on a text, to say what TEACHER says of it, and print the new folder.

    Checkpoints and TensorBoard's logs are in FOLDER.training; the same command goes on after an interruption.
    Several processes train together under torchrun.
    """
    if from_scratch == (teacher is not None):
        raise UsageError("A student has either a teacher or none.", "Give TEACHER, or --from-scratch.")
    try:
        from miaotui.compress.train.distil import distil
    except ImportError as error:
        raise needs_torch(error) from error
    request, settings = _asked(teacher, options)
    with progress("training") as tell:
        report = distil(request, out, settings, write=_written, say=_say, tell=tell)
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes
        return
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        click.echo(out)


def _asked(teacher: str | None, options: dict[str, Any]) -> tuple[Request, Settings]:
    """What the options ask for. Raises UsageError for those that mean nothing without another."""
    from miaotui.compress.train.distil import Request
    from miaotui.compress.train.settings import Privacy, Settings, Terms
    from miaotui.compress.train.student import Lora

    rank, alpha, targets = (options.pop(name) for name in ("lora", "lora_alpha", "lora_targets"))
    epsilon, delta = options.pop("dp_epsilon"), options.pop("dp_delta")
    if rank is None and (alpha is not None or targets is not None):
        raise UsageError("--lora-alpha and --lora-targets are of low-rank additions.", "Add --lora RANK.")
    if (epsilon is None) != (delta is None):
        raise UsageError("Privacy is a pair of ε and δ.", "Give both --dp-epsilon and --dp-delta.")
    names = split_names(targets, "--lora-targets")
    lora = None if rank is None else Lora(rank, alpha, tuple(names) if names else ("*",))
    weights = {name: options.pop(name) for name in ("kl", "ce", "hidden", "temperature", "top")}
    if teacher is None:
        _refuse_taught(weights)
    weights["kl"] = (0.0 if teacher is None else 1.0) if weights["kl"] is None else weights["kl"]
    weights["ce"] = (1.0 if teacher is None else 0.0) if weights["ce"] is None else weights["ce"]
    request = Request(
        teacher=teacher, lora=lora, **{name: options.pop(name) for name in ("student", "tokenizer", "scheme", "dtype")}
    )
    tasks = _tasks(options.pop("data"))
    privacy = None if epsilon is None else Privacy(epsilon, delta)
    return request, Settings(tasks=tasks, terms=Terms(**weights), privacy=privacy, **options)


def _refuse_taught(weights: dict[str, Any]) -> None:
    """Options that are about a teacher. Raises UsageError for one that is given where there is none."""
    if weights["kl"] or weights["hidden"] or weights["top"] or weights["temperature"] != 1.0:
        raise UsageError(
            "--kl, --hidden, --top and --temperature are about a teacher.", "Leave them out with --from-scratch."
        )


def _tasks(data: Sequence[str]) -> tuple[Task, ...]:
    """`FILE` or `FILE=WEIGHT`; a file may have an = in its name as well."""
    from miaotui.compress.train.settings import Task

    found = []
    for text in data:
        source, _, weight = text.rpartition("=")
        if not source or Path(text).exists():
            found.append(Task(text))
            continue
        try:
            found.append(Task(source, float(weight)))
        except ValueError as error:
            raise UsageError(f"{text!r:.100} has no weight after its =.", "Write FILE=2, for example.") from error
    return tuple(found) or (Task(),)


def _written(folder: Path, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> list[list[int]]:
    """What the model in `folder` goes on with, drawn at temperature 1, by our own engine."""
    from miaotui.engine.llm import LLM
    from miaotui.engine.params import SamplingParams

    params = [
        SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, seed=seed + i) for i in range(len(prompts))
    ]
    with LLM(str(folder), max_model_len=tokens + max(map(len, prompts)), keep_packed=False) as llm:
        outputs = llm.generate([list(prompt) for prompt in prompts], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _say(line: str) -> None:
    click.echo(line, err=True)
