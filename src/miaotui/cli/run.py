"""`miaotui run`: one prompt, its answer on stdout as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.load import load
from miaotui.cli.options import MODEL, engine_options, sampling_options, sampling_params, take_engine
from miaotui.cli.text import argument, piped
from miaotui.errors import RequestError, UsageError

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM
    from miaotui.engine.params import SamplingParams
    from miaotui.engine.request import RequestOutput


@click.command("run")
@MODEL
@click.argument("prompt", required=False)
@click.option("--system", help="What the model is told before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the chat template.")
@sampling_options
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the finished answer and its figures as JSON.")
@click.option("--stats", is_flag=True, help="Say the speed on stderr afterwards.")
def command(
    model: str, prompt: str | None, system: str | None, raw: bool, as_json: bool, stats: bool, **options: Any
) -> None:
    """Answer PROMPT, or what is piped in, with MODEL.

    The answer goes to stdout as it is made.
    """
    text = argument(prompt, "PROMPT") if prompt is not None else piped()
    if not text.strip():
        raise UsageError("There is no prompt.", 'Give one, as in `miaotui run demo "Hello"`, or pipe one in.')
    if raw and system is not None:
        raise UsageError("--system needs the chat template that --raw leaves out.", "Drop one of the two.")
    told = None if system is None else argument(system, "--system")
    started = time.perf_counter()
    params = sampling_params(options)
    with load(model, take_engine(options)) as llm:
        tally = Tally(started, time.perf_counter())
        for output in llm.stream(text, params) if raw else _answer(llm, text, told, params):
            piece = tally.add(output)
            if piece and not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    sys.stdout.write(json.dumps(tally.report(model), ensure_ascii=False) + "\n" if as_json else "\n")
    if stats:
        click.echo(tally.sentence(), err=True)


def _answer(llm: LLM, text: str, system: str | None, params: SamplingParams) -> Iterator[RequestOutput]:
    """The stream of an answer to a message. Raises RequestError for a model that knows no messages."""
    if llm.chat_template is None:
        raise RequestError(f"{llm.model} has no chat template.", "Add --raw to continue the prompt as it stands.")
    told = [] if system is None else [{"role": "system", "content": system}]
    return llm.stream_chat([*told, {"role": "user", "content": text}], params)


class Tally:
    """An answer as it grows, and when its parts came. Times are of `perf_counter`."""

    def __init__(self, started: float, loaded: float) -> None:
        self.started, self.loaded = started, loaded
        self.first: float | None = None
        self.last = loaded
        self.text = ""
        self.tokens = self.first_tokens = 0
        self.prompt_tokens = 0
        self.finish_reason: str | None = None

    def add(self, output: RequestOutput) -> str:
        """Count one output of a stream; its new text."""
        completion = output.outputs[0]
        self.last = time.perf_counter()
        self.tokens += len(completion.token_ids)
        if self.first is None:
            self.first, self.first_tokens = self.last, self.tokens
        self.prompt_tokens = len(output.prompt_token_ids)
        self.finish_reason = completion.finish_reason or self.finish_reason
        self.text += completion.text
        return completion.text

    @property
    def speed(self) -> float | None:
        """New tokens a second after the first; None for an answer of one token."""
        if self.first is None or self.tokens <= self.first_tokens:
            return None
        return (self.tokens - self.first_tokens) / (self.last - self.first)

    def report(self, model: str) -> dict[str, Any]:
        """For JSON. Seconds and bytes; `peak_memory_bytes` is None where the system does not tell."""
        return {
            "model": model,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "load_seconds": self.loaded - self.started,
            "first_token_seconds": None if self.first is None else self.first - self.loaded,
            "tokens_per_second": self.speed,
            "peak_memory_bytes": peak_memory(),
        }

    def sentence(self) -> str:
        """For people, in one line."""
        parts = [f"{self.prompt_tokens} tokens in, {self.tokens} out", f"load {self.loaded - self.started:.2f} s"]
        if self.first is not None:
            parts.append(f"first token {self.first - self.loaded:.2f} s")
        if self.speed is not None:
            parts.append(f"{self.speed:.1f} tokens/s")
        return " · ".join(parts)


def peak_memory() -> int | None:
    """The most resident memory this process ever had, in bytes (Linux's VmHWM; None elsewhere)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
