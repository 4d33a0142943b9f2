"""Energy and heat while something runs: joules per token where the machine counts them, and else why not. No guesses.

What is counted is what the named parts of the machine used meanwhile, whoever used it, the idle share included.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from miaotui.engine.params import SamplingParams
from miaotui.hardware import power, sensors
from miaotui.hardware.cgroups import ROOT
from miaotui.hardware.gpus import Live, live_gpus
from miaotui.measure.stats import summarise

HOT = 95.0
"""°C from which processors begin to slow themselves down."""
PERIOD = 0.1
"""Seconds between looks at what must be sampled: watts, heat, counters that begin anew."""
ROUND = 0.3
"""Least seconds of a round: counters move every few hundredths of a second."""
PROMPT, ANSWER = 16, 64
REGIME = f"decode-1@{PROMPT}"


@dataclass(frozen=True)
class Used:
    """In `seconds`: `joules` of `sources`, or None and why they are `unavailable`.

    `celsius` is the hottest that any sensor was, `throttled` how often the processors slowed themselves down, and
    `marks` say what puts every figure of that time in doubt.
    """

    seconds: float
    joules: float | None
    sources: tuple[str, ...] = ()
    unavailable: str | None = None
    celsius: float | None = None
    throttled: int = 0
    marks: tuple[str, ...] = ()


class Meter:
    """Counts while it is entered: `with Meter() as meter: …; meter.read()`. `gpus`: the devices that do the work."""

    def __init__(self, *, root: Path = ROOT, gpus: Sequence[Live] = (), period: float = PERIOD) -> None:
        self._root, self._gpus, self._period = root, gpus, period
        found = power.processor(root)
        devices = () if found.meters else tuple(gpu.energy for gpu in gpus)  # a meter of the machine has them in it
        self.sources = power.Sources((*found.counters, *devices), found.meters, found.refused)
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="miaotui-energy", daemon=True)

    def __enter__(self) -> Meter:
        self._started = self._seen = time.perf_counter()
        self._joules = 0.0
        self._last = [counter.read() for counter in self.sources.counters]
        self._watts = [meter.read() for meter in self.sources.meters]
        self._lost: str | None = None
        self._hottest, self._slowed = sensors.hottest(self._root), dict[str, str]()
        self._throttles = sensors.throttles(self._root)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def read(self) -> Used:
        """What was used since it was entered."""
        with self._lock:
            self._look()
            why = self.sources.why or self._lost
            throttled = sensors.throttles(self._root) - self._throttles
            return Used(
                time.perf_counter() - self._started,
                None if why else self._joules,
                () if why else self.sources.names,
                why,
                self._hottest,
                throttled,
                self._marks(throttled),
            )

    # -- sampling ------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        while not self._end.wait(self._period):
            with self._lock:
                self._look()

    def _look(self) -> None:
        now = time.perf_counter()
        for index, counter in enumerate(self.sources.counters):
            self._last[index] = self._count(counter, self._last[index])
        for index, meter in enumerate(self.sources.meters):
            watts = meter.read()
            self._integrate(meter, self._watts[index], watts, now - self._seen)
            self._watts[index] = watts
        self._seen = now
        degrees = [sensors.hottest(self._root), self._hottest, *(gpu.celsius() for gpu in self._gpus)]
        self._hottest = max((one for one in degrees if one is not None), default=None)
        self._slowed |= {gpu.name: why for gpu in self._gpus if (why := gpu.slowed()) is not None}

    def _count(self, counter: power.Counter, before: float | None) -> float | None:
        """Add what a counter went on by since `before`; a range that it ran through is added to it."""
        now = counter.read()
        if now is None or before is None:
            self._lost = f"{counter.name} stopped answering"
            return now
        step = now - before
        if step < 0 and counter.range is None:
            self._lost = f"{counter.name} went backwards"
            return now
        self._joules += step if step >= 0 else step + (counter.range or 0.0)
        return now

    def _integrate(self, meter: power.PowerMeter, before: float | None, now: float | None, seconds: float) -> None:
        if before is None or now is None:
            self._lost = f"{meter.name} stopped answering"
        else:
            self._joules += (before + now) / 2 * seconds

    def _marks(self, throttled: int) -> tuple[str, ...]:
        marks = []
        if throttled:
            marks.append(f"the processor slowed itself down {throttled} times because of heat or power")
        if self._hottest is not None and self._hottest >= HOT:
            marks.append(f"the hottest sensor reached {self._hottest:.0f} °C")
        marks += [f"{name} was slowed down by {why}" for name, why in self._slowed.items()]
        return tuple(marks)


# -- per token -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TokenEnergy:
    """Joules for a new token: the median of rounds with its 95% interval; or None, and why it is `unavailable`."""

    regime: str
    joules_per_token: float | None = None
    low: float | None = None
    high: float | None = None
    sources: tuple[str, ...] = ()
    unavailable: str | None = None
    celsius: float | None = None
    marks: tuple[str, ...] = field(default=())


class Generates(Protocol):
    """What is asked of an LLM here."""

    def generate(self, prompts: Any, sampling_params: SamplingParams) -> Sequence[Any]: ...


def per_token(
    work: Callable[[], int], *, regime: str, seconds: float = 4.0, root: Path = ROOT, gpus: Sequence[Live] = ()
) -> TokenEnergy:
    """Measure `work`, which returns how many new tokens it made, in rounds that take `seconds` in all.

    Where nothing counts energy, `work` is not run.
    """
    with Meter(root=root, gpus=gpus) as meter:
        if meter.sources.why is not None:
            return TokenEnergy(regime, unavailable=meter.sources.why)
        work()  # warm-up
        rounds: list[float] = []
        before = first = meter.read()
        while (before.seconds - first.seconds < seconds or len(rounds) < 3) and before.unavailable is None:
            tokens = 0
            while (after := meter.read()).seconds - before.seconds < ROUND or not tokens:
                tokens += work()
            if after.joules is not None and before.joules is not None:
                rounds.append((after.joules - before.joules) / tokens)
            before = after
    if before.unavailable is not None:
        return TokenEnergy(regime, unavailable=before.unavailable, celsius=before.celsius, marks=before.marks)
    if not any(rounds):
        return TokenEnergy(regime, unavailable=f"{before.sources[0]} stood still while tokens were made")
    figure = summarise(rounds, higher_is_better=False)
    return TokenEnergy(
        regime, figure.median, figure.low, figure.high, before.sources, None, before.celsius, before.marks
    )


def of_llm(llm: Generates, prompt: Callable[[int], Any], *, device: str = "cpu", seconds: float = 4.0) -> TokenEnergy:
    """Of one sequence at a time: 16 tokens in, 64 out, the prompt's part included. `prompt(n)` gives n fresh tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)

    def work() -> int:
        (output,) = llm.generate([prompt(PROMPT)], params)
        return len(output.outputs[0].token_ids)

    gpus = live_gpus() if device.startswith("cuda") else []
    return per_token(work, regime=REGIME, seconds=seconds, gpus=gpus)


def sentence(energy: Mapping[str, Any]) -> str:
    """A TokenEnergy's fields in a line for people."""
    if energy["joules_per_token"] is None:
        return f"energy: unavailable ({energy['unavailable']})"
    figure = f"{energy['joules_per_token']:.3g} J/token ({energy['low']:.3g} – {energy['high']:.3g})"
    return "; ".join((f"energy: {figure} at {energy['regime']}, {', '.join(energy['sources'])}", *energy["marks"]))
