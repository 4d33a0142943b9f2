"""Where the marks of the report's charts stand. Numbers only: the template draws them, and escapes every word."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from miaotui.accelerate.card.schema import Card, Floor, Sensitivity, Trial
from miaotui.measure.intervals import Estimate

Kind = Literal["won", "front", "dominated", "broken"]
Scale = Callable[[float], float]

EXACT = 1e-9
"""A KL that is nothing but rounding: it stands at the foot of the axis, which is logarithmic, and reads 0."""


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Label:
    """A mark's name: below it and to the right, where nothing better lies; flush with the plot where that is full."""

    x: float
    y: float
    anchor: Literal["start", "end"]
    text: str


@dataclass(frozen=True)
class Mark:
    """A trial: its place, the ends of its intervals, what it is, and what is told of it."""

    trial: Trial
    kind: Kind
    x: float
    y: float
    left: float
    right: float
    top: float
    bottom: float
    label: Label | None


@dataclass(frozen=True)
class Pareto:
    """Pixels of a drawing of `width` × `height`, its plot between `x0` and `x1`, and `y0` (above) and `y1`."""

    width: int
    height: int
    x0: float
    x1: float
    y0: float
    y1: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    line: str
    """The front as the points of a polyline."""
    floor: float | None
    """Where the floor lies: halfway between the last trial that holds it and the first that does not."""
    baseline: float | None
    more_is_better: bool


def pareto(card: Card, width: int, height: int) -> Pareto | None:
    """Speed against KL; None when less than one trial has both."""
    trials = [trial for trial in card.search.trials if trial.speed is not None and trial.kl is not None]
    if not trials:
        return None
    x0, x1, y0, y1 = 66.0, width - 18.0, 16.0, height - 50.0
    speeds = [s.median for t in trials if (s := t.speed)]
    if card.search.baseline is not None:
        speeds.append(card.search.baseline.median)
    low, high, step = _span(min(speeds), max(speeds), 4 if width < 500 else 7)
    down, y_ticks = _logarithmic([t.kl.value for t in trials if t.kl], y0, y1)

    def across(value: float) -> float:
        return x0 + (x1 - x0) * (min(max(value, low), high) - low) / (high - low)

    front = card.search.front()
    marks = [_mark(trial, front, card.floor, across, down) for trial in trials]
    marks = [replace(mark, label=_label(mark, x0, x1)) if mark.kind == "won" else mark for mark in marks]
    order = ("dominated", "broken", "front", "won")
    boundary = _boundary(trials, card.floor)
    baseline = card.search.baseline
    return Pareto(
        width, height, x0, x1, y0, y1,
        tuple(Tick(across(low + i * step), f"{low + i * step:,g}") for i in range(round((high - low) / step) + 1)),
        y_ticks,
        tuple(sorted(marks, key=lambda mark: order.index(mark.kind))),
        _stairs([(mark.x, mark.y) for trial in front for mark in marks if mark.trial is trial]),
        None if boundary is None else down(boundary),
        None if baseline is None else across(baseline.median),
        all(t.speed.better == "higher" for t in trials if t.speed),
    )  # fmt: skip


def _mark(trial: Trial, front: Sequence[Trial], floor: Floor, across: Scale, down: Scale) -> Mark:
    assert trial.speed is not None
    assert trial.kl is not None
    kind: Kind = "front" if any(trial is one for one in front) else "dominated"
    if trial.state == "won":
        kind = "won"
    elif breaks(trial, floor):
        kind = "broken"
    speed, kl = trial.speed, trial.kl
    ends = (kl.value if end is None else end for end in (kl.high, kl.low))
    top, bottom = (down(end) for end in ends)
    x, y = across(speed.median), down(kl.value)
    return Mark(trial, kind, x, y, across(speed.low), across(speed.high), top, bottom, None)


def _label(mark: Mark, x0: float, x1: float) -> Label | None:
    """None for a name so long that it would hide others: the legend has it too."""
    text = mark.trial.name
    if _LETTER * len(text) > (x1 - x0) / 2:
        return None
    start = mark.x + 12
    if start + _LETTER * len(text) <= x1:
        return Label(start, mark.y + 22, "start", text)
    return Label(x1, mark.y + 26, "end", text)


_LETTER = 8.0
"""Pixels of a letter, on the safe side."""


def breaks(trial: Trial, floor: Floor) -> bool:
    """Whether the trial's measured perplexity is over the floor."""
    return trial.perplexity_ratio is not None and trial.perplexity_ratio.value > 1 + floor.loss


def _boundary(trials: Sequence[Trial], floor: Floor) -> float | None:
    """The KL between trials that hold the floor and those that do not; None where KL does not part them."""
    known = [trial for trial in trials if trial.perplexity_ratio is not None]
    held = [_value(trial.kl) for trial in known if not breaks(trial, floor)]
    broken = [_value(trial.kl) for trial in known if breaks(trial, floor)]
    if not held or not broken or max(held) >= min(broken):
        return None
    return math.sqrt(max(held) * min(broken))


def _value(kl: Estimate | None) -> float:
    assert kl is not None
    return max(EXACT, kl.value)


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    """The front's edge: from a point up to the next one's KL, then across to it. What lies above and left is beaten."""
    path: list[tuple[float, float]] = []
    for x, y in points:
        if path:
            path.append((path[-1][0], y))
        path.append((x, y))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in path)


def _span(low: float, high: float, most: int) -> tuple[float, float, float]:
    """Round ends around both, and the step between ticks: 1, 2 or 5 times a power of ten, `most` steps or so."""
    reach = (high - low) or abs(high) or 1.0
    raw = 1.16 * reach / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    start = step * math.floor((low - 0.08 * reach) / step)
    if low >= 0:
        start = max(0.0, start)
    return start, step * math.ceil((high + 0.08 * reach) / step), step


def _logarithmic(values: Sequence[float], y0: float, y1: float) -> tuple[Scale, tuple[Tick, ...]]:
    """Where a KL stands, growing upwards from y1 to y0, and the ticks; what is exact has a place of its own below."""
    lossy = [value for value in values if value > EXACT] or [1e-3]
    foot = y1 if len(lossy) == len(values) else y1 - 34
    least, most = math.log10(min(lossy) / 1.5), math.log10(max(lossy) * 1.5)

    def down(value: float) -> float:
        if value <= EXACT:
            return y1 - 12
        return foot - (foot - y0) * min(1.0, max(0.0, (math.log10(value) - least) / (most - least)))

    ticks = [Tick(down(value), f"{value:g}") for value in _log_ticks(least, most)]
    return down, tuple(ticks if foot == y1 else [Tick(y1 - 12, "0"), *ticks])


def _log_ticks(least: float, most: float) -> list[float]:
    """Powers of ten, with twice and five times each where there would be less than three."""
    powers = range(math.floor(least), math.ceil(most) + 1)
    factors = (1,) if most - least > 2.5 else (1, 3) if most - least > 1.2 else (1, 2, 5)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in values if least <= math.log10(value) <= most]


# -- sensitivity -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Heat:
    """A cell: `level` from 0 to 1 on a scale that all cells share; None where nothing was measured."""

    layer: int
    role: str
    kl: float | None
    level: float


@dataclass(frozen=True)
class HeatMap:
    """Rows by role, each over all layers; `totals` of each layer, and the largest values of both."""

    schemes: tuple[str, ...]
    layers: tuple[int, ...]
    roles: tuple[tuple[str, tuple[Heat, ...]], ...]
    totals: tuple[Heat, ...]
    most: float
    most_total: float

    @property
    def ticks(self) -> frozenset[int]:
        """The layers that the axis names: eight or so, the first and the last among them."""
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1 << 30) if len(self.layers) <= 8 * step)
        last = self.layers[-1]
        inner = {layer for layer in self.layers if layer % step == 0 and last - layer > step / 2}
        return frozenset(inner | {self.layers[0], last})


def heat_map(found: Sequence[Sensitivity]) -> HeatMap | None:
    """None without any."""
    if not found:
        return None
    layers = tuple(sorted({one.layer for one in found}))
    roles = tuple(dict.fromkeys(one.role for one in found))
    values = {(one.layer, one.role): one.kl for one in found}
    most = max(values.values()) or 1.0
    sums = {layer: sum(values.get((layer, role), 0.0) for role in roles) for layer in layers}
    largest = max(sums.values()) or 1.0

    def heat(layer: int, role: str) -> Heat:
        kl = values.get((layer, role))
        return Heat(layer, role, kl, 0.0 if kl is None else max(0.0, kl / most))

    return HeatMap(
        tuple(dict.fromkeys(one.scheme for one in found)),
        layers,
        tuple((role, tuple(heat(layer, role) for layer in layers)) for role in roles),
        tuple(Heat(layer, "all", kl, max(0.0, kl / largest)) for layer, kl in sums.items()),
        most,
        largest,
    )
