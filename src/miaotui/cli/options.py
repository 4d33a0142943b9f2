"""Options that several commands share, and what becomes of them. Their names are the names of LLM's arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from miaotui.errors import RequestError, UsageError

if TYPE_CHECKING:
    from miaotui.engine.params import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

MODEL = click.argument("model")

TOOL_CALL_PARSER = click.option(
    "--tool-call-parser",
    type=click.Choice(["hermes", "llama3_json", "mistral"]),
    help="How the model writes calls of tools.  [default: as its chat template says]",
)


class Size(click.ParamType[int]):
    """Bytes as a whole number, or with a unit of 1024: 512M, 1.5G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
        size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
        if size < 1:
            self.fail(f"{value!r} is no size in bytes. Write a number, or one with a unit, such as 512M or 2G.")
        return size


ENGINE = {
    "compute": click.option(
        "--compute", type=click.Choice(["auto", "fp32", "int8-batch"]), default="auto", show_default=True,
        help="auto: integer weights meet activations in int8; int8-batch: 16 rows and more meet weights recoded to "
        "int8, which is faster, takes memory for both and costs some quality; fp32: the exact path.",
    ),
    "kv_cache_dtype": click.option(
        "--kv-cache-dtype", type=click.Choice(["auto", "fp32", "bf16", "int8"]), default="auto", show_default=True,
        help="How keys and values are kept.",
    ),
    "kv_cache_memory_bytes": click.option(
        "--kv-cache-memory-bytes", type=Size(), help="Size of the KV cache: 512M, 2G.  [default: what fits]"
    ),
    "max_model_len": click.option(
        "--max-model-len", type=click.IntRange(min=1), help="Tokens of prompt and answer.  [default: what fits]"
    ),
    "max_num_seqs": click.option(
        "--max-num-seqs", type=click.IntRange(min=1), help="Sequences in one step at most.  [default: 64]"
    ),
    "max_num_batched_tokens": click.option(
        "--max-num-batched-tokens", type=click.IntRange(min=1), help="Tokens in one step at most.  [default: 512]"
    ),
    "prefix_cache_file": click.option(
        "--prefix-cache-file", type=click.Path(dir_okay=False), help="Keep idle prefixes in this file, also for later."
    ),
    "prefix_cache_bytes": click.option(
        "--prefix-cache-bytes", type=Size(), help="The most that file may take: 512M, 2G.  [default: 1G]"
    ),
    "speculative": click.option(
        "--speculative", "--speculative-config", "speculative", metavar="ngram|JSON|none",
        help="Guess tokens and check them together; the answer stays the same. ngram repeats what stood there before; "
        '{"model": "…", "num_speculative_tokens": 4} asks a small model of the same tokenizer.  '
        "[default: what the model recommends, else none]",
    ),
    "threads": click.option(
        "--threads", type=click.IntRange(min=1), help="Compute threads.  [default: one a physical core]"
    ),
    "device": click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda", "reference"]), default="auto", show_default=True,
        help="Where to compute.",
    ),
    "keep_packed": click.option(
        "--keep-packed/--no-keep-packed", default=None,
        help="Keep a large model's packed weights on disk, for a quick next start.  [default: keep]",
    ),
    "greedy_screen": click.option(
        "--greedy-screen/--no-greedy-screen", default=None,
        help="Keep the head once more in 4 bits where greedy answers of one or two streams then come faster; they stay "
        "the same.  [default: keep]",
    ),
}  # fmt: skip

SAMPLING = {
    "max_tokens": click.option("--max-tokens", type=int, help="New tokens at most.  [default: all that fit]"),
    "temperature": click.option(
        "--temperature", type=float, default=0.7, show_default=True, help="0 always takes the likeliest token."
    ),
    "top_p": click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling."),
    "top_k": click.option("--top-k", type=int, default=0, show_default=True, help="Likeliest tokens kept; 0: all."),
    "min_p": click.option(
        "--min-p", type=float, default=0.0, show_default=True, help="Least probability, relative to the likeliest."
    ),
    "seed": click.option("--seed", type=int, help="Same seed, same answer."),
    "stop": click.option("--stop", multiple=True, help="End before this text. Can be given several times."),
}


def engine_options(function: F) -> F:
    """Add the options of ENGINE to a command."""
    return _add(function, ENGINE)


def measured_engine_options(function: F) -> F:
    """`engine_options` without those of the prefix cache, which measurements leave off."""
    return _add(function, {name: option for name, option in ENGINE.items() if not name.startswith("prefix_cache")})


def sampling_options(function: F) -> F:
    """Add the options of SAMPLING to a command."""
    return _add(function, SAMPLING)


def _add(function: F, options: dict[str, Any]) -> F:
    for option in reversed(options.values()):
        function = option(function)
    return function


def take_engine(options: dict[str, Any]) -> dict[str, Any]:
    """Take LLM's keyword arguments out of a command's options; those that were not given are left to LLM.

    Raises UsageError for one that would do nothing without another.
    """
    context = click.get_current_context(silent=True)
    engine: dict[str, Any] = {}
    for name in ENGINE:
        value = options.pop(name, None)
        left = context is not None and context.get_parameter_source(name) is ParameterSource.DEFAULT
        if value is not None and not left:
            engine[name] = value
    if "prefix_cache_bytes" in engine and "prefix_cache_file" not in engine:
        raise UsageError("--prefix-cache-bytes bounds a file that is not named.", "Add --prefix-cache-file FILE.")
    return engine


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Take SamplingParams' fields out of a command's options."""
    fields = {name: options.pop(name) for name in SAMPLING}
    return {**fields, "stop": list(fields["stop"]) or None}


def sampling_params(options: dict[str, Any]) -> SamplingParams:
    """Take SamplingParams out of a command's options. Raises UsageError for a value that means nothing."""
    from miaotui.engine.params import SamplingParams

    try:
        return SamplingParams(**take_sampling(options))
    except RequestError as error:
        raise UsageError(error.message, error.hint) from error


def as_flags(engine: dict[str, Any]) -> list[str]:
    """The command line's spelling of what `take_engine` gave."""
    flags: list[str] = []
    for name, value in engine.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def split_names(text: str | None, what: str) -> list[str] | None:
    """`a,b` as a list; None stays None. Raises UsageError when nothing is named."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{what} names nothing.", "Give names with commas between them.")
    return names
