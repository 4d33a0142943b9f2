"""`miaotui bench`: speed by regime, each figure with its interval and beside the machine's measured ceiling.

Regimes are measured in rounds, one sample of each a round, so that a machine that drifts drifts for all of them; of
several models each round has one sample of each, in turn. Prompts are random tokens, never the same twice, so that no
cached prefix helps.

| regime | unit | what one sample is |
|---|---|---|
| start | s | a new process: from its start to the first text of `miaotui run MODEL hi` on stdout |
| peak-memory | MB | a new process: its peak resident memory after answering, 10⁶ bytes |
| load | s | `LLM(MODEL)` in a warm process, until it can take requests |
| prefill-512 | tokens/s | 512 prompt tokens ÷ time to the first new token |
| decode-1@C | tokens/s | one new token at batch 1, 1 ÷ the time since the one before, from context C on |
| throughput-N | tokens/s | N requests at once, 128 tokens in and 128 out: new tokens ÷ wall time |
| decode-1@long | tokens/s | as decode-1, from the longest context that fits, 8192 at most; only when asked for |
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from miaotui.engine.llm import LLM
from miaotui.engine.params import SamplingParams
from miaotui.errors import MiaotuiError, RequestError, ResourceError, UsageError
from miaotui.hardware import ceilings, detect, sensors
from miaotui.hardware.ceilings import Ceilings, Probes
from miaotui.measure.energy import TokenEnergy, of_llm
from miaotui.measure.prompts import cut, prose
from miaotui.measure.stats import summarise
from miaotui.measure.work import Cost

DECODE_TOKENS = 32
"""New tokens of one decode run, each of them a sample."""
REQUEST = 128
"""Tokens in and tokens out of a throughput request."""
LONGEST = 8192
"""Tokens that a long context has at the most: more would take longer to read than a benchmark should."""
TIGHT = 0.02
"""Half an interval, as a share of the median, from which a regime is not sampled again when time is short."""
LOAD_AGAIN = ("start", "load", "peak-memory")
"""Regimes that hold the model a second time while the first is in memory."""


@dataclass(frozen=True)
class Settings:
    """How the model is loaded: `options` are the keyword arguments of LLM, `flags` the same for `miaotui run`."""

    model: str
    options: Mapping[str, Any]
    flags: Sequence[str]
    weights: Literal["own", "dummy"] = "own"
    """Whether they are the model's own; the report says so."""


class Subject:
    """The loaded model under measurement, and a source of prompts that were never seen before."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.llm = LLM(settings.model, **settings.options, enable_prefix_caching=False)
        executor = self.llm.engine.executor
        compute = settings.options.get("compute", "auto")
        sizes = executor.weight_bytes, executor.block_bytes
        self.cost = Cost.of(self.llm.spec, *sizes, compute, executor.greedy_bytes)
        self._random = np.random.default_rng(20240229)

    @property
    def longest(self) -> int:
        """Positions of the longest context that leaves room to decode, `LONGEST` at most."""
        return max(1, min(LONGEST, self.llm.engine.executor.shape.max_model_len - DECODE_TOKENS - 1))

    def prompt(self, tokens: int) -> dict[str, list[int]]:
        """That many tokens from a random place of a text; of a model whose weights are not its own, random ones."""
        if self.settings.weights == "own":
            return {"prompt_token_ids": cut(self._text, tokens, self._random)}
        return {"prompt_token_ids": self._random.integers(0, self.cost.spec.vocab_size, tokens).tolist()}

    @cached_property
    def _text(self) -> list[int]:
        return prose(self.llm.tokenizer.encode)

    def close(self) -> None:
        self.llm.close()


@dataclass(frozen=True)
class Regime:
    """`sample` takes samples; `ceiling` is the best this machine could do, in the same unit, or None.

    usual: measured when no regimes are named. positions: tokens that one of its requests has, prompt and answer; 0 for
    a regime that has as many as the model allows.
    """

    name: str
    unit: str
    higher_is_better: bool
    sample: Callable[[Subject], list[float]]
    ceiling: Callable[[Subject, Ceilings], float | None]
    usual: bool = True
    positions: int = 0


def regimes() -> dict[str, Regime]:
    """Every regime by name, in the order in which they are reported."""
    table = [
        Regime("start", "s", False, _start, lambda subject, limits: None),
        Regime("load", "s", False, _load, lambda subject, limits: subject.cost.weight_bytes / limits.bandwidth),
        Regime("peak-memory", "MB", False, _peak_memory, lambda subject, limits: subject.cost.weight_bytes / 1e6),
        Regime("prefill-512", "tokens/s", True, _prefill, _prefill_ceiling, positions=513),
        *(_decode_regime(context) for context in (16, 512)),
        *(_throughput_regime(requests) for requests in (8, 64)),
        _decode_regime(None),
    ]
    return {regime.name: regime for regime in table}


def run(
    settings: Settings,
    probes: Probes,
    *,
    names: Sequence[str] | None = None,
    repeat: int = 5,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure and return the report: `{"machine", "model", "results", "energy"}` as `miaotui bench --json` prints it.

    `energy`, a `TokenEnergy`, is there when a regime is about tokens. `tell` is called with a line for people at each
    stage, and with "" at the end.
    Raises UsageError for an unknown regime.
    """
    return run_beside([settings], probes, names=names, repeat=repeat, tell=tell)[0]


def run_beside(
    several: Sequence[Settings],
    probes: Probes,
    *,
    names: Sequence[str] | None = None,
    repeat: int = 5,
    seconds: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`run` for models that are all in memory and take turns: one report for each.

    With `seconds`, a regime is sampled until its intervals are tight or the time is over, `repeat` times at most, and
    what is not likely to end in time is not begun: a regime may be left with its warm-up as its only sample, and but
    for the first with none, in which case the report lacks it.
    """
    chosen = select(names)
    machine = detect.detect()
    watch = sensors.Watch()
    subjects: list[Subject] = []
    try:
        for settings in several:
            tell(f"loading {settings.model}")
            subjects.append(Subject(settings))
        tell("measuring this machine's ceilings")
        limits = [_limits(probes, subject) for subject in subjects]
        samples = _rounds(chosen, subjects, repeat, seconds, tell)
        results = [
            [_result(regime, taken[regime.name], subject, most) for regime in chosen if taken[regime.name]]
            for subject, taken, most in zip(subjects, samples, limits, strict=True)
        ]
        models = [_describe(subject) for subject in subjects]
        tokens = any(regime.unit == "tokens/s" for regime in chosen)
        energies = [{"energy": asdict(_energy(subject, tell))} if tokens else {} for subject in subjects]
    finally:
        tell("")
        for subject in subjects:
            subject.close()
    disturbance = asdict(watch.read())
    return [
        {
            "machine": {**machine.as_dict(), "ceilings": asdict(most), "disturbance": disturbance},
            "model": model,
            "results": found,
            **spent,
        }
        for model, found, most, spent in zip(models, results, limits, energies, strict=True)
    ]


def _energy(subject: Subject, tell: Callable[[str], None]) -> TokenEnergy:
    tell("measuring energy")
    return of_llm(subject.llm, subject.prompt, device=subject.settings.options.get("device", "cpu"))


def _limits(probes: Probes, subject: Subject) -> Ceilings:
    working_set = ceilings.within(subject.cost.weight_bytes, detect.available_memory())
    return ceilings.measure(probes, _threads(subject.settings), working_set)


def _rounds(
    chosen: Sequence[Regime],
    subjects: Sequence[Subject],
    repeat: int,
    seconds: float | None,
    tell: Callable[[str], None],
) -> list[dict[str, list[float]]]:
    """A warm-up, then rounds: for each subject its samples by regime. In a hurry, the warm-up counts where it must."""
    samples: list[dict[str, list[float]]] = [{regime.name: [] for regime in chosen} for _ in subjects]
    cold: dict[str, list[list[float]]] = {}
    took: dict[str, float] = {}
    ends = None if seconds is None else time.perf_counter() + seconds
    for number in range(repeat + 1):
        for regime in chosen:
            if ends is not None and not _again(regime, samples, took, ends):
                continue
            tell(f"round {number}/{repeat}: {regime.name}" if number else f"warm-up: {regime.name}")
            started = time.perf_counter()
            found = [_sample(regime, subject) for subject in subjects]
            took[regime.name] = time.perf_counter() - started
            if number == 0:
                cold[regime.name] = found
                continue
            for taken, new in zip(samples, found, strict=True):
                taken[regime.name] += new
    for name, found in cold.items():
        for taken, new in zip(samples, found, strict=True):
            taken[name] = taken[name] or new
    return samples


def _again(
    regime: Regime, samples: Sequence[Mapping[str, list[float]]], took: Mapping[str, float], ends: float
) -> bool:
    """Whether another sample is wanted, and there is time for it; of the very first one always."""
    if took and time.perf_counter() + took.get(regime.name, 0.0) > ends:
        return False
    if not samples[0][regime.name]:
        return True
    figures = [summarise(taken[regime.name], higher_is_better=regime.higher_is_better) for taken in samples]
    tight = all(figure.high - figure.low <= 2 * TIGHT * figure.median for figure in figures)
    few = min(len(taken[regime.name]) for taken in samples) < 3
    return few or not tight


def select(names: Sequence[str] | None) -> list[Regime]:
    """The regimes of these names; the usual ones when None."""
    table = regimes()
    unknown = [name for name in names or () if name not in table]
    if unknown:
        raise UsageError(f"There is no regime called {unknown[0]!r}.", f"Choose from {', '.join(table)}.")
    return [table[name] for name in names] if names else [r for r in table.values() if r.usual]


def _sample(regime: Regime, subject: Subject) -> list[float]:
    try:
        return regime.sample(subject)
    except RequestError as error:
        hint = "Raise --max-model-len, or leave this regime out with --regimes."
        raise ResourceError(f"{regime.name} cannot be measured: {error.message}", hint) from error


def _result(regime: Regime, samples: list[float], subject: Subject, limits: Ceilings) -> dict[str, Any]:
    figure = summarise(samples, higher_is_better=regime.higher_is_better)
    better = "higher" if regime.higher_is_better else "lower"
    counted = {"ceiling": regime.ceiling(subject, limits), "samples": len(samples), "better": better}
    return {"regime": regime.name, "unit": regime.unit, **asdict(figure), **counted}


def _describe(subject: Subject) -> dict[str, Any]:
    cost, settings = subject.cost, subject.settings
    return {
        "name": settings.model,
        "family": cost.spec.family,
        "layers": len(cost.spec.layers),
        "weights": settings.weights,
        "options": dict(settings.options),
        "weight_bytes": cost.weight_bytes,
        "cache_bytes_per_token": cost.cache_bytes,
        "integer": cost.integer,
    }


def _threads(settings: Settings) -> int:
    return settings.options.get("threads") or detect.usable_cores()


# -- new processes ---------------------------------------------------------------------------------------


def _start(subject: Subject) -> list[float]:
    flags = ["--max-tokens", "8", "--temperature", "0"]
    started = time.perf_counter()
    with _spawn(subject.settings, "hi", flags, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    _check(process.returncode, first)
    return [seconds]


def _peak_memory(subject: Subject) -> list[float]:
    return [peak_memory(subject.settings) / 1e6]


def peak_memory(settings: Settings) -> float:
    """The most resident bytes of a new process that answers a question of some 250 tokens with 32."""
    question = "Write a list of one hundred animals, one on each line. " * 20
    with _spawn(settings, question, ["--max-tokens", "32", "--temperature", "0", "--json"]) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    _check(process.returncode, output)
    return float(json.loads(output)["peak_memory_bytes"])


def _spawn(settings: Settings, prompt: str, flags: Sequence[str], bufsize: int = -1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "miaotui.cli.main", "run", settings.model, prompt, *flags, *settings.flags]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=bufsize, env=os.environ)


def _check(status: int, output: bytes) -> None:
    if status != 0 or not output:
        raise MiaotuiError(
            f"A fresh `miaotui run` ended with status {status} and no answer.", "Its own message is above."
        )


# -- in this process -------------------------------------------------------------------------------------


def _load(subject: Subject) -> list[float]:
    started = time.perf_counter()
    llm = LLM(subject.settings.model, **subject.settings.options)
    seconds = time.perf_counter() - started
    llm.close()
    return [seconds]


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def _arrivals(subject: Subject, prompt_tokens: int, new_tokens: int) -> list[tuple[float, int]]:
    """Seconds since the request and tokens in all, at each output of a stream."""
    started, count, arrivals = time.perf_counter(), 0, []
    for output in subject.llm.stream(subject.prompt(prompt_tokens), _params(new_tokens)):
        count += sum(len(completion.token_ids) for completion in output.outputs)
        arrivals.append((time.perf_counter() - started, count))
    return arrivals


def _prefill(subject: Subject) -> list[float]:
    seconds, _ = _arrivals(subject, 512, 1)[0]
    return [512 / seconds]


def _prefill_ceiling(subject: Subject, limits: Ceilings) -> float:
    cost = subject.cost
    return 512 / cost.seconds(cost.step([512], new_tokens=512), limits)


def _decode_regime(context: int | None) -> Regime:
    """None: the subject's longest."""

    def sample(subject: Subject) -> list[float]:
        arrivals = _arrivals(subject, context or subject.longest, DECODE_TOKENS + 1)
        pairs = itertools.pairwise(arrivals)
        return [(count - before) / (now - then) for (then, before), (now, count) in pairs if count > before]

    def ceiling(subject: Subject, limits: Ceilings) -> float:
        cost = subject.cost
        return 1 / cost.seconds(cost.step([(context or subject.longest) + DECODE_TOKENS // 2]), limits)

    name, positions = f"decode-1@{context or 'long'}", 0 if context is None else context + DECODE_TOKENS + 1
    return Regime(name, "tokens/s", True, sample, ceiling, context is not None, positions)


def _throughput_regime(requests: int) -> Regime:
    def sample(subject: Subject) -> list[float]:
        prompts = [subject.prompt(REQUEST) for _ in range(requests)]
        started = time.perf_counter()
        outputs = subject.llm.generate(prompts, _params(REQUEST))
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        if tokens != requests * REQUEST:
            raise ResourceError(
                f"{requests} requests of {2 * REQUEST} tokens gave {tokens} of {requests * REQUEST} tokens.",
                "Raise --max-model-len, or leave this regime out with --regimes.",
            )
        return [tokens / seconds]

    def ceiling(subject: Subject, limits: Ceilings) -> float:
        """All prompts in one step, then steps of all sequences; the first new token comes with the prompts."""
        cost = subject.cost
        seconds = cost.seconds(cost.step([REQUEST] * requests, new_tokens=REQUEST), limits)
        for length in range(REQUEST + 1, 2 * REQUEST):
            seconds += cost.seconds(cost.step([length] * requests), limits)
        return requests * REQUEST / seconds

    return Regime(f"throughput-{requests}", "tokens/s", True, sample, ceiling, positions=2 * REQUEST)
