"""`miaotui bench serve`: how a server answers under load."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.options import split_names
from miaotui.cli.progress import progress
from miaotui.errors import MiaotuiError, UsageError

if TYPE_CHECKING:
    from miaotui.measure.serving import ServingSettings
    from miaotui.measure.serving_data import Dataset

_SEVERAL = ("--goodput", "--header", "--metadata")
"""Options that take several values, as `--goodput ttft:500 tpot:50`, or are given again."""
_OF_RANDOM = {"random_input_len": "input_len", "random_output_len": "output_len", "random_range_ratio": "range_ratio"}
_LENGTHS = {**_OF_RANDOM, "output_len": "output_len"}
"""Fields of Dataset by option."""
_SAME = (
    *("base_url", "backend", "endpoint", "model", "tokenizer", "num_prompts", "request_rate", "burstiness"),
    *("max_concurrency", "insecure", "num_warmups", "seed"),
)
"""Fields of ServingSettings that are options as they are."""


class _Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the name of an option of `_SEVERAL` before each of its values."""
        spread: list[str] = []
        name: str | None = None
        for word in args:
            if word.startswith("-"):
                name = word if word in _SEVERAL else None
            elif name is not None and spread[-1] != name:
                spread.append(name)
            spread.append(word)
        return super().parse_args(ctx, spread)


@click.command("bench serve", cls=_Command)
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option(
    "--backend",
    type=click.Choice(["openai", "openai-chat"]),
    default="openai",
    show_default=True,
    help="Ask for completions, or for answers in a chat.",
)
@click.option("--endpoint", metavar="PATH", help="Where to ask.  [default: /v1/completions, /v1/chat/completions]")
@click.option("--model", help="What the server calls the model.  [default: the first that it lists]")
@click.option(
    "--tokenizer",
    metavar="MODEL|FILE",
    help="Counts a prompt's tokens: a model that is here, or a tokenizer.json.  [default: the server's /tokenize]",
)
@click.option("--api-key", help="Sent as a bearer token.  [default: OPENAI_API_KEY from the environment]")
@click.option("--header", multiple=True, metavar="KEY=VALUE …", help="Headers to send besides.")
@click.option("--insecure", is_flag=True, help="Take any certificate from an HTTPS server.")
@click.option(
    "--dataset-name",
    type=click.Choice(["random", "custom", "sharegpt"]),
    default="random",
    show_default=True,
    help='Random words; lines of {"prompt": …} in a file; first questions of conversations in a file.',
)
@click.option("--dataset-path", metavar="FILE", help="The file of custom (JSONL) or sharegpt (JSON).")
@click.option("--random-input-len", type=click.IntRange(min=1), help="Tokens of a random prompt.  [default: 1024]")
@click.option("--random-output-len", type=click.IntRange(min=1), help="New tokens for a random prompt.  [default: 128]")
@click.option(
    "--random-range-ratio",
    type=click.FloatRange(0, 1, max_open=True),
    help="Both lengths vary by this share, up and down.  [default: 0]",
)
@click.option(
    "--output-len",
    type=click.IntRange(min=1),
    help="New tokens for each prompt of a file.  [default: custom: the line's output_tokens, or 256; sharegpt: as "
    "many as the answer there has]",
)
@click.option("--num-prompts", type=click.IntRange(min=1), default=1000, show_default=True, help="Requests in all.")
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Requests a second, at random times.  [default: inf, all at once]",
)
@click.option(
    "--burstiness",
    type=click.FloatRange(min=0, min_open=True),
    help="Below 1: requests come in bursts; above: more steadily.  [default: 1, a Poisson process]",
)
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Requests under way at once.  [default: no limit]")
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=None,
    help="Have answers go on to their full length.  [default: for random prompts]",
)
@click.option("--temperature", type=click.FloatRange(min=0), help="Of the requests.  [default: the server's own]")
@click.option("--extra-body", metavar="JSON", help="Fields to add to each request, such as '{\"top_k\": 5}'.")
@click.option(
    "--goodput",
    multiple=True,
    metavar="NAME:MS …",
    help="Count requests that take no more than this: of ttft, tpot, e2el, such as ttft:500 tpot:50.",
)
@click.option(
    "--percentile-metrics",
    metavar="A,B,…",
    default="ttft,tpot,itl,e2el",
    show_default=True,
    help="Latencies to tell: these, and client_queue_time, e2el_including_client_queue.",
)
@click.option("--metric-percentiles", metavar="P,Q,…", default="99", show_default=True, help="Their percentiles.")
@click.option("--num-warmups", type=click.IntRange(min=0), default=0, show_default=True, help="Requests beforehand.")
@click.option(
    "--ready-check-timeout-sec",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    help="Seconds to wait for a server that still starts.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same prompts and arrivals.")
@click.option("--save-result", is_flag=True, help="Write the report to a JSON file.")
@click.option("--save-detailed", is_flag=True, help="With lists of what each request took, and its text.")
@click.option("--result-dir", metavar="FOLDER", help="Where that file goes; made if need be.  [default: here]")
@click.option("--result-filename", metavar="FILE", help="Its name.  [default: from backend, rate, model and date]")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE …", help="To be written into that file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")  # fmt: skip
def command(as_json: bool, **options: Any) -> None:
    """Measure how a server answers under load.

    It may be any server with OpenAI's interface. Options and the names in the report are those of vLLM's `bench serve`.
    """
    _check(options)
    settings, metadata = _settings(options), _pairs("--metadata", options["metadata"])
    from miaotui.measure.serving import run
    from miaotui.measure.serving_report import DETAILS, table

    with progress("requests") as tell:
        report = run(settings, tell)
    detailed = {name: report.pop(name) for name in DETAILS}
    if options["save_result"]:
        _save({**metadata, **report, **(detailed if options["save_detailed"] else {})}, options)
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        from rich.console import Console

        shown = table(report, settings.percentile_metrics, settings.metric_percentiles)
        Console(width=None if sys.stdout.isatty() else 120).print(shown, highlight=False)
    if not report["completed"]:
        cause = report["failures"][0]
        raise MiaotuiError(
            f"No request was answered: {cause['cause']}: {cause['example']}.", "The first one was; look at its log."
        )


# -- from options to settings ------------------------------------------------------------------------------
def _check(options: dict[str, Any]) -> None:
    """Raises UsageError for an option that would do nothing."""
    dataset = options["dataset_name"]
    for given in _OF_RANDOM:
        if options[given] is not None and dataset != "random":
            raise UsageError(f"{_flag(given)} is for random prompts.", f"Leave it out with --dataset-name {dataset}.")
    for given in ("dataset_path", "output_len"):
        if options[given] is not None and dataset == "random":
            raise UsageError(f"{_flag(given)} is for prompts of a file.", "Give --dataset-name custom or sharegpt.")
    if dataset != "random" and options["dataset_path"] is None:
        raise UsageError(f"--dataset-name {dataset} needs its file.", "Add --dataset-path FILE.")
    if options["burstiness"] is not None and options["request_rate"] in (None, math.inf):
        raise UsageError("--burstiness is of a rate, and there is none.", "Add --request-rate.")
    for given in ("save_detailed", "result_dir", "result_filename", "metadata"):
        if options[given] and not options["save_result"]:
            raise UsageError(f"{_flag(given)} is about a file that is not written.", "Add --save-result.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _settings(options: dict[str, Any]) -> ServingSettings:
    from miaotui.measure.serving import ServingSettings

    given = {name: value for name, value in options.items() if value is not None}
    names = split_names(options["percentile_metrics"], "--percentile-metrics")
    percentiles = split_names(options["metric_percentiles"], "--metric-percentiles")
    return ServingSettings(
        dataset=_dataset(given),
        goodput=_goals(options["goodput"]),
        percentile_metrics=names or [],
        metric_percentiles=[_number("--metric-percentiles", value) for value in percentiles or []],
        ignore_eos=given.get("ignore_eos", options["dataset_name"] == "random"),
        extra_body=_extra_body(given),
        headers=_headers(options),
        ready_check_timeout=options["ready_check_timeout_sec"],
        **{name: given[name] for name in _SAME if name in given},
    )


def _dataset(given: dict[str, Any]) -> Dataset:
    from miaotui.measure.serving_data import Dataset

    lengths = {name: given[option] for option, name in _LENGTHS.items() if option in given}
    path = Path(given["dataset_path"]).expanduser() if "dataset_path" in given else None
    return Dataset(name=given["dataset_name"], path=path, **lengths)


def _extra_body(given: dict[str, Any]) -> dict[str, Any]:
    fields = {"temperature": given["temperature"]} if "temperature" in given else {}
    text = given.get("extra_body", "{}")
    try:
        extra = json.loads(text)
    except json.JSONDecodeError:
        extra = None
    if not isinstance(extra, dict):
        raise UsageError(f"--extra-body is no JSON object: {text[:80]}", "Write it as '{\"name\": value}'.")
    return {**fields, **extra}


def _headers(options: dict[str, Any]) -> dict[str, str]:
    headers = _pairs("--header", options["header"])
    key = options["api_key"] or os.environ.get("OPENAI_API_KEY")
    if key and "authorization" not in map(str.lower, headers):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """`KEY=VALUE` words as a dict."""
    pairs = [word.partition("=") for word in given]
    wrong = next((word for word, (_, sign, _) in zip(given, pairs, strict=True) if not sign), None)
    if wrong is not None:
        raise UsageError(f"{option} {wrong!r} is not KEY=VALUE.", "Put = between its name and its value.")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _goals(given: tuple[str, ...]) -> dict[str, float]:
    """`NAME:MS` words as a dict."""
    goals = {}
    for word in given:
        name, sign, most = word.partition(":")
        if not sign:
            raise UsageError(f"--goodput {word!r} is not NAME:MS.", "Write it as ttft:500, in milliseconds.")
        goals[name] = _number("--goodput", most)
    return goals


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise UsageError(f"{option} has {text!r} where a number belongs.", "Give one from 0 on.")
    return value


# -- the file ----------------------------------------------------------------------------------------------
def _save(report: dict[str, Any], options: dict[str, Any]) -> None:
    """Write the report, atomically, and say where."""
    from miaotui.checkpoint.write import atomic_file

    folder = Path(options["result_dir"] or ".").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (options["result_filename"] or _file_name(report))
    with atomic_file(path) as file:
        file.write(json.dumps(report, ensure_ascii=False).encode())
    click.echo(f"saved {path}", err=True)


def _file_name(report: dict[str, Any]) -> str:
    """As vLLM has it."""
    limit = report["max_concurrency"]
    at_once = f"-concurrency{limit}" if limit else ""
    name = f"{report['backend']}-{report['request_rate']}qps{at_once}-{report['model_id'].split('/')[-1]}"
    return f"{name}-{report['date']}.json"
