"""Where a step's time goes: each kind of op with its share of the time, and of what the machine could do.

The native program times its ops on the first thread, waiting for the others included. What remains of the engine's
step is the host: scheduling, index arrays, sampling and publishing in Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from miaotui.backends.ops import FEW_ROWS, OpWork
from miaotui.engine.engine import MOST_STEPS, Engine
from miaotui.engine.params import SamplingParams
from miaotui.errors import UsageError
from miaotui.hardware import ceilings, detect
from miaotui.hardware.ceilings import Ceilings, Probes
from miaotui.measure.speed import Settings, Subject
from miaotui.measure.work import Work


class Profiled(Protocol):
    """What an executor must offer to be profiled: the CPU backend's does."""

    def start_profile(self) -> None: ...

    def stop_profile(self) -> tuple[list[tuple[str, float]], int]: ...

    def op_work(self) -> list[OpWork]: ...


@dataclass(frozen=True)
class Case:
    """Steps of `requests` sequences at `context` positions, each adding `new_tokens`."""

    name: str
    requests: int
    context: int
    new_tokens: int
    steps: int


CASES = (
    Case("decode-1@16", 1, 16, 1, 64),
    Case("decode-1@512", 1, 512, 1, 64),
    Case("decode-64@128", 64, 128, 1, 16),
    Case("prefill-512", 1, 512, 512, 3),
)


@dataclass
class Line:
    """One kind of op: how many a step has, its seconds a step, and the least seconds this machine needs for it."""

    op: str
    count: int = 0
    seconds: float = 0.0
    least: float = 0.0


def run(settings: Settings, probes: Probes, *, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Profile every case that fits: `{"machine", "model", "cases": [{"case", "seconds", "lines": […]}]}`.

    Raises UsageError when the device's executor cannot be profiled.
    """
    machine = detect.detect()
    subject = Subject(settings)
    try:
        executor = subject.llm.engine.executor
        if not hasattr(executor, "start_profile"):
            raise UsageError("Only the CPU backend times its ops.", "Leave --profile out, or use --device cpu.")
        tell("measuring this machine's ceilings")
        working_set = ceilings.within(subject.cost.weight_bytes, detect.available_memory())
        threads = settings.options.get("threads") or detect.usable_cores()
        limits = ceilings.measure(probes, threads, working_set)
        longest, most = executor.shape.max_model_len, executor.shape.max_seqs
        fitting = [c for c in CASES if c.context + 2 * c.steps < longest and c.requests <= most]
        cases = []
        for case in fitting:
            tell(case.name)
            cases.append(_profile(subject, case, limits))
    finally:
        tell("")
        subject.close()
    return {
        "machine": {**machine.as_dict(), "ceilings": asdict(limits)},
        "model": {"name": settings.model, "weight_bytes": subject.cost.weight_bytes},
        "cases": cases,
    }


def _profile(subject: Subject, case: Case, limits: Ceilings) -> dict[str, Any]:
    executor: Any = subject.llm.engine.executor
    _begin(subject, case)
    _end(subject)  # once before, so that no step is the first to touch a part of the cache
    _begin(subject, case)
    executor.start_profile()
    started = time.perf_counter()
    steps = _steps(subject, case)
    wall = time.perf_counter() - started
    ops, runs = executor.stop_profile()
    _end(subject)
    lines = _lines(subject, case, executor, ops, runs, limits)
    native = sum(seconds for _, seconds in ops)
    lines.append(Line("host (Python)", 1, (wall - native) / steps))
    return {"case": case.name, "seconds": wall / steps, "lines": [asdict(line) for line in lines]}


def _begin(subject: Subject, case: Case) -> None:
    """Until every request of the case decodes, or with one prompt asked for and not yet read."""
    engine = subject.llm.engine
    if case.new_tokens > 1:
        _ask(subject, case, 1)
        return
    most = engine.executor.shape.max_tokens
    chunks = -(-case.context // most)  # steps that the last prompt may still need
    prompts = -(-case.requests * case.context // most)
    for _ in range(case.requests):
        _ask(subject, case, 2 * (prompts + chunks + MOST_STEPS) + case.steps)
    while engine.stats.waiting:
        engine.step()
    _advance(engine, chunks + 2)  # and two to warm up


def _end(subject: Subject) -> None:
    while subject.llm.engine.has_work:
        subject.llm.engine.step()


def _ask(subject: Subject, case: Case, tokens: int) -> None:
    prompt = subject.prompt(case.context)["prompt_token_ids"]
    subject.llm.engine.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))


def _steps(subject: Subject, case: Case) -> int:
    """Run the case's steps, or its prompts one after another; how many steps there were."""
    engine = subject.llm.engine
    before = engine.stats.steps
    if case.new_tokens == 1:
        _advance(engine, case.steps)
    for index in range(case.steps if case.new_tokens > 1 else 0):
        if index:
            _ask(subject, case, 1)
        while engine.has_work:
            engine.step()
    return engine.stats.steps - before


def _advance(engine: Engine, steps: int) -> None:
    """Run so many steps, or the few more that end with one of them."""
    end = engine.stats.steps + steps
    while engine.stats.steps < end:
        engine.step()


def _lines(
    subject: Subject, case: Case, executor: Profiled, ops: list[tuple[str, float]], runs: int, limits: Ceilings
) -> list[Line]:
    """Ops of one name together, slowest first."""
    cost = subject.cost
    tokens = case.requests * case.new_tokens
    lines: dict[str, Line] = {}
    few = case.requests <= FEW_ROWS
    for (name, seconds), op in zip(ops, executor.op_work(), strict=True):
        line = lines.setdefault(name, Line(name))
        line.count += 1
        line.seconds += seconds / runs
        rows = case.requests if op.of_logits else tokens
        read = op.greedy_bytes if few else op.bytes
        line.least += cost.seconds(Work(read, 2.0 * op.products * rows, 0.0), limits)
    if "attention" in lines:
        whole = cost.step([case.context] * case.requests, case.new_tokens)
        cached = whole.bytes - cost.read(case.requests)
        lines["attention"].least = cost.seconds(Work(cached, 0.0, whole.attention_operations), limits)
    return sorted(lines.values(), key=lambda line: -line.seconds)
