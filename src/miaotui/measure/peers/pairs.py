"""Pairs of runs: ours, peer, ours, peer …, the machine's limits probed between any two of them.

Only neighbours in time can be compared, because what a (virtual) machine can do moves by a factor of two. So a
pair gives one ratio, and a ratio's interval is that of the median over pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from miaotui.hardware.ceilings import Ceilings
from miaotui.hardware.sensors import BUSY, Watch
from miaotui.measure.peers.alone.peer_runners.worker import Generation
from miaotui.measure.peers.environments import PeerUnavailableError
from miaotui.measure.prompts import cut
from miaotui.measure.stats import summarise
from miaotui.measure.work import Cost


class Engine(Protocol):
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation: ...

    def cpu_seconds(self) -> float:
        """Processor time that it has taken so far."""
        ...


@dataclass(frozen=True)
class Regime:
    """`streams` prompts of `prompt` tokens, and `new_tokens` more for each. The value is in tokens/s.

    prefill: prompt tokens ÷ time to the first new token. decode: new tokens after the first ÷ the time they take.
    throughput: new tokens of all streams ÷ the whole run, its prompts included. `weight`: its share of the time.
    """

    name: str
    kind: Literal["prefill", "decode", "throughput"]
    streams: int
    prompt: int
    new_tokens: int
    weight: float

    def value(self, run: Generation) -> float:
        """Raises PeerUnavailableError for a run that did not generate what was asked."""
        if [len(ids) for ids in run.ids] != [self.new_tokens] * self.streams:
            raise PeerUnavailableError(f"{self.name} gave {sum(map(len, run.ids))} tokens instead of those asked for")
        if self.kind == "throughput":
            return self.streams * self.new_tokens / run.seconds
        if len(run.arrivals) != self.new_tokens:
            raise PeerUnavailableError(f"{self.name} told when {len(run.arrivals)} of {self.new_tokens} tokens came")
        if self.kind == "prefill":
            return self.prompt / run.arrivals[0]
        return (self.new_tokens - 1) / (run.arrivals[-1] - run.arrivals[0])

    def ceiling(self, cost: Cost, limits: Ceilings) -> float:
        """The value on a machine that did nothing but what must be done, at its measured limits."""
        if self.kind == "prefill":
            return self.prompt / cost.seconds(cost.step([self.prompt], new_tokens=self.prompt), limits)
        if self.kind == "decode":
            return 1 / cost.seconds(cost.step([self.prompt + self.new_tokens // 2]), limits)
        seconds = cost.seconds(cost.step([self.prompt] * self.streams, new_tokens=self.prompt), limits)
        for length in range(self.prompt + 1, self.prompt + self.new_tokens):
            seconds += cost.seconds(cost.step([length] * self.streams), limits)
        return self.streams * self.new_tokens / seconds


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("decode-1@16", "decode", 1, 16, 65, 1),
        Regime("decode-1@512", "decode", 1, 512, 65, 1),
        Regime("prefill-512", "prefill", 1, 512, 1, 1),
        Regime("throughput-32", "throughput", 32, 128, 128, 2),
        Regime("throughput-64", "throughput", 64, 128, 128, 3.5),
    )
}


@dataclass(frozen=True)
class Moment:
    """The machine between two runs: bytes/s at best, operations/s, and the cores' worth of time that others took.
    `sustained`: bytes/s in the median round; None where that was not looked at."""

    bandwidth: float
    int8: float
    others: float
    sustained: float | None = None


@dataclass(frozen=True)
class Run:
    """`others`: the cores' worth of time that neither engine took meanwhile; 0 for a run too short to tell."""

    engine: Literal["ours", "peer"]
    value: float
    others: float
    before: Moment
    after: Moment

    @property
    def disturbed(self) -> bool:
        return max(self.others, self.before.others, self.after.others) >= BUSY


@dataclass(frozen=True)
class Plan:
    """At least `least` pairs, at most `most`, and none that is likely to end after the regime's share of `seconds`."""

    seconds: float = 150.0
    least: int = 3
    most: int = 15


Probe = Callable[[], Moment]
Clock = Callable[[], float]
Pair = tuple[Run, Run]
"""Ours, then the peer's."""


@dataclass(frozen=True)
class Duel:
    """Two loaded engines, of which only the one that is asked is awake, and how to judge the machine in between.

    `text`: tokens to cut prompts from.
    """

    ours: Engine
    peer: Engine
    text: Sequence[int]
    probe: Probe
    plan: Plan
    clock: Clock = time.monotonic

    def measure(self, regimes: Sequence[Regime], tell: Callable[[str], None] = lambda line: None) -> list[list[Pair]]:
        """Each regime's pairs in the order in which they were made."""
        total = sum(regime.weight for regime in regimes)
        found = []
        for index, regime in enumerate(regimes):
            tell(f"{regime.name} ({index + 1}/{len(regimes)})")
            found.append(self._pairs(regime, self.plan.seconds * regime.weight / total))
        return found

    def _pairs(self, regime: Regime, seconds: float) -> list[Pair]:
        random = np.random.default_rng([20240229, regime.streams, regime.prompt])
        started = self.clock()
        for engine in (self.ours, self.peer):  # memory is touched and code compiled before anything counts
            engine.generate(self._prompts(regime, random), regime.new_tokens)
        pairs: list[Pair] = []
        before = self.probe()
        while len(pairs) < self.plan.most:
            began = self.clock()
            asked = self._prompts(regime, random)
            mine = self._run("ours", regime, asked, before)
            theirs = self._run("peer", regime, asked, mine.after)
            pairs.append((mine, theirs))
            before = theirs.after
            now = self.clock()
            if len(pairs) >= self.plan.least and now + (now - began) > started + seconds:
                break
        return pairs

    def _prompts(self, regime: Regime, random: np.random.Generator) -> list[list[int]]:
        """New ones for each pair, so that no cache helps."""
        return [cut(self.text, regime.prompt, random) for _ in range(regime.streams)]

    def _run(self, name: Literal["ours", "peer"], regime: Regime, asked: list[list[int]], before: Moment) -> Run:
        engine = self.ours if name == "ours" else self.peer
        watch, spent, started = Watch(), engine.cpu_seconds(), time.perf_counter()
        answer = engine.generate(asked, regime.new_tokens)
        seconds = time.perf_counter() - started
        others = max(0.0, watch.read().others - (engine.cpu_seconds() - spent) / seconds)
        return Run(name, regime.value(answer), others, before, self.probe())


def summary(
    regime: Regime, pairs: Sequence[Pair], costs: dict[str, Cost], limits: Ceilings, least: int
) -> dict[str, Any]:
    """One regime's entry in the report; `costs` by engine. `limits` gives what is not probed around each run.

    Pairs that others disturbed are left out as long as `least` are left. The peak of bfloat16 arithmetic is not
    probed: an engine that uses it has a ceiling only where bandwidth sets it.
    """
    quiet = [pair for pair in pairs if not any(run.disturbed for run in pair)]
    used = quiet if len(quiet) >= least else list(pairs)
    entry: dict[str, Any] = {"regime": regime.name, "unit": "tokens/s", "pairs": len(used)}
    entry["left_out"] = len(pairs) - len(used)
    entry["disturbed"] = sum(pair not in quiet for pair in used)
    for index, engine in enumerate(("ours", "peer")):
        entry[engine] = _figure(regime, [pair[index] for pair in used], costs[engine], limits)
    ratios = [mine.value / theirs.value for mine, theirs in used]
    figure = summarise(ratios, higher_is_better=True)
    entry["ratio"] = {"median": figure.median, "low": figure.low, "high": figure.high, "each": ratios}
    entry["runs"] = [asdict(run) for pair in pairs for run in pair]
    return entry


def _figure(regime: Regime, runs: Sequence[Run], cost: Cost, limits: Ceilings) -> dict[str, Any]:
    """Median, its interval, the range as a share of it, and the median shares of the ceiling: at its best and, where
    bandwidth sets it, sustained."""
    values = [run.value for run in runs]
    figure = summarise(values, higher_is_better=True)
    known = cost.integer or regime.kind == "decode"
    return {
        "median": figure.median,
        "low": figure.low,
        "high": figure.high,
        "spread": (max(values) - min(values)) / figure.median,
        "of_ceiling": float(np.median([_share(regime, run, cost, limits) for run in runs])) if known else None,
        "of_sustained": _sustained_share(regime, runs, cost, limits) if regime.kind == "decode" else None,
    }


def _share(regime: Regime, run: Run, cost: Cost, limits: Ceilings) -> float:
    """The run against the better of the two moments around it, which is the stricter judge."""
    bandwidth = max(run.before.bandwidth, run.after.bandwidth)
    around = replace(limits, bandwidth=bandwidth, int8=max(run.before.int8, run.after.int8))
    return run.value / regime.ceiling(cost, around)


def _sustained_share(regime: Regime, runs: Sequence[Run], cost: Cost, limits: Ceilings) -> float | None:
    """The median run against what memory gave in the median round of the moments around it: a run is as long as many
    rounds, and the best of these lasts for milliseconds."""
    shares = []
    for run in runs:
        if run.before.sustained is None or run.after.sustained is None:
            return None
        around = replace(limits, bandwidth=(run.before.sustained + run.after.sustained) / 2)
        shares.append(run.value / regime.ceiling(cost, around))
    return float(np.median(shares))


def same_start(ours: Engine, peer: Engine, prompt: Sequence[int], tokens: int = 24, least: int = 4) -> dict[str, Any]:
    """Both continue a real prompt: how many tokens agree before the first difference, and what they said.

    Rounding differs between engines, so that greedy texts part sooner or later; below `least` tokens it is taken for
    another model. Raises PeerUnavailableError then.
    """
    mine, theirs = (engine.generate([prompt], tokens).ids[0] for engine in (ours, peer))
    agree = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    if agree < least:
        raise PeerUnavailableError(f"it answers differently from the start: {theirs[:8]} where ours gives {mine[:8]}")
    return {"tokens": tokens, "agree": agree, "ours": mine, "peer": theirs}
