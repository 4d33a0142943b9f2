"""A card's before-and-after table as text: one source for the terminal, the README and the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miaotui.accelerate.card.schema import Card, Energy, Quality, Speed, Task
from miaotui.measure.intervals import Estimate

Group = Literal["speed", "quality", "size", "energy"]


@dataclass(frozen=True)
class Cell:
    """A figure and its 95% interval, where it has one; `share` of the ceiling likewise."""

    value: str
    interval: str = ""
    share: str = ""


@dataclass(frozen=True)
class Row:
    """One measure. `change` is text such as `4.3×` or `+0.4%`; `better` says whether it is for the better."""

    group: Group
    name: str
    unit: str
    before: Cell | None
    after: Cell | None
    change: str = ""
    better: bool | None = None


def rows(card: Card) -> list[Row]:
    """Every measure that either side has."""
    return [*_speeds(card), *_size(card), *_qualities(card), *_energies(card)]


# -- text of figures -------------------------------------------------------------------------------------
def decimals(value: float, digits: int = 3) -> int:
    """How many decimals show that many digits that matter."""
    return max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0


def number(value: float, digits: int = 3) -> str:
    """That many digits that matter, thousands apart: 0.0123, 12.3, 1,234."""
    return f"{value:,.{decimals(value, digits)}f}"


def cell(value: float, low: float | None, high: float | None, *, digits: int = 3) -> Cell:
    """A figure, and its interval's ends with as many decimals."""
    places = decimals(value or high or 0.0, digits)
    if low is None or high is None:
        return Cell(f"{value:,.{places}f}")
    return Cell(f"{value:,.{places}f}", f"{low:,.{places}f} – {high:,.{places}f}")


def percent(value: float, places: int = 0) -> str:
    return f"{100 * value:.{places}f}%"


def times(ratio: float) -> str:
    """How many times as good: `4.28×`, `1.02×`, `37×`."""
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.2f}×"


def change_of(ratio: Estimate) -> Cell:
    """A ratio of perplexities as what it adds: `+0.43%`."""
    value = f"{ratio.value - 1:+.2%}"
    if ratio.low is None or ratio.high is None:
        return Cell(value)
    return Cell(value, f"{ratio.low - 1:+.2%} – {ratio.high - 1:+.2%}")


def size(count: float) -> str:
    """Bytes for people, powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} B"


# -- rows ------------------------------------------------------------------------------------------------
def _speeds(card: Card) -> Iterator[Row]:
    for before, after in card.speed.pairs():
        one = after or before
        assert one is not None
        change, better = "", None
        if before is not None and after is not None and (gain := after.gain(before)):
            change, better = times(gain), None if before.low <= after.median <= before.high else gain > 1
        yield Row("speed", one.regime, one.unit, _speed(before), _speed(after), change, better)


def _speed(speed: Speed | None) -> Cell | None:
    if speed is None:
        return None
    plain = cell(speed.median, speed.low, speed.high)
    return Cell(plain.value, plain.interval, "" if speed.share is None else percent(speed.share))


def _size(card: Card) -> Iterator[Row]:
    was, now = card.model.bytes, card.artefact.bytes
    if card.artefact.kept_original:
        yield Row("size", "weights", "MB", Cell(number(was / 1e6)), None)
    else:
        change, better = times(was / now) if now else "", None if was == now else now < was
        yield Row("size", "weights", "MB", Cell(number(was / 1e6)), Cell(number(now / 1e6)), change, better)


def _qualities(card: Card) -> Iterator[Row]:
    before, after = card.quality.before, card.quality.after
    yield _perplexity(before, after)
    if after is not None:
        yield from _against(after)
    yield from _tasks(before, after)


def _perplexity(before: Quality, after: Quality | None) -> Row:
    was = _figure(before.perplexity, digits=4)
    now = None if after is None else _figure(after.perplexity, digits=4)
    if after is None or after.perplexity_ratio is None:
        return Row("quality", "perplexity", "", was, now)
    ratio, change = after.perplexity_ratio, change_of(after.perplexity_ratio)
    told = f"{change.value} ({change.interval})" if change.interval else change.value
    apart = ratio.low is not None and ratio.high is not None and not ratio.low <= 1 <= ratio.high
    return Row("quality", "perplexity", "", was, now, told, ratio.value < 1 if apart else None)


def _against(after: Quality) -> Iterator[Row]:
    """What is measured against the original: it has no value of its own."""
    for name, unit, figure in (("KL mean", "nats", after.kl_mean), ("KL p99", "nats", after.kl_p99)):
        if figure is not None:
            yield Row("quality", name, unit, None, _figure(figure))
    if after.top1_flips is not None:
        flips = after.top1_flips
        low, high = (None if end is None else 100 * end for end in (flips.low, flips.high))
        yield Row("quality", "top-1 flips", "%", None, cell(100 * flips.value, low, high))
    if after.greedy_agreement is not None:
        unit = f"of {after.greedy_tokens} tokens"
        yield Row("quality", "greedy agreement", unit, None, _figure(after.greedy_agreement))


def _tasks(before: Quality, after: Quality | None) -> Iterator[Row]:
    sides = [{(task.name, task.metric): task for task in one.tasks} if one else {} for one in (before, after)]
    for key in {**sides[0], **sides[1]}:
        was, now = (side.get(key) for side in sides)
        change, better = _task_change(was, now)
        yield Row("quality", " ".join(key), "", _task(was), _task(now), change, better)


def _task(task: Task | None) -> Cell | None:
    return None if task is None else _figure(task.score)


def _task_change(was: Task | None, now: Task | None) -> tuple[str, bool | None]:
    """The difference; it counts as one where each lies outside the other's interval."""
    if was is None or now is None:
        return "", None
    difference = now.score.value - was.score.value
    if _inside(was.score.value, now.score) or _inside(now.score.value, was.score):
        return f"{difference:+.3f}", None
    return f"{difference:+.3f}", (difference > 0) == now.higher_is_better


def _inside(value: float, of: Estimate) -> bool:
    return of.low is None or of.high is None or of.low <= value <= of.high


def _energies(card: Card) -> Iterator[Row]:
    """A row where either side was measured; why it was not is said elsewhere, once."""
    before, after = card.energy.before, card.energy.after
    was, now = (None if side is None else side.joules_per_token for side in (before, after))
    if was is None and now is None:
        return
    regime = before.regime or (after.regime if after else None)
    name = f"energy, {regime}" if regime else "energy"
    old, new = (None if side is None else _energy(side) for side in (before, after))
    change, better = (times(was / now), now < was) if was and now else ("", None)
    yield Row("energy", name, "J/token", old, new, change, better)


def _energy(energy: Energy) -> Cell | None:
    joules = energy.joules_per_token
    return None if joules is None else cell(joules, energy.low, energy.high)


def _figure(figure: Estimate, digits: int = 3) -> Cell:
    return cell(figure.value, figure.low, figure.high, digits=digits)
