"""Mixed precision: which linear gets how many bits, so that the sum of errors is least within a budget.

A knapsack in which one choice is taken of each linear. Its relaxation is solved exactly by going down the lower convex
hulls of (bits, error), steepest step first (Sinha and Zoltners 1979, "The multiple-choice knapsack problem"); what is
left over then buys single steps. The result is optimal but for at most one linear's step. That errors of linears add
up is HAWQ-V2's assumption too (Dong et al. 2019, arXiv 1911.03852).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from miaotui.errors import UsageError

TOLERANCE = 1e-9
"""Of the budget, for sums of floats."""


def assign(
    errors: Sequence[Sequence[float]], sizes: Sequence[int], bits: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """The choice for each linear.

    errors, bits: of each linear under each of its choices: what it costs in quality (any additive measure, such as the
    output's relative error by `Quantised.error`), and bits a weight (`LinearScheme.bits`). sizes: weights of each.
    budget: bits a weight on average over all. Raises UsageError for a budget that the cheapest choices exceed, and for
    errors that are not finite.
    """
    for of_choice in errors:
        if not all(math.isfinite(error) for error in of_choice):
            raise UsageError("A sensitivity is not finite.", "Check the model: does it answer sensibly?")
    hulls = [_hull(e, b) for e, b in zip(errors, bits, strict=True)]
    room = budget * sum(sizes) * (1 + TOLERANCE)
    room -= sum(size * bits[i][hull[0]] for i, (hull, size) in enumerate(zip(hulls, sizes, strict=True)))
    if room < 0:
        least = sum(s * bits[i][hulls[i][0]] for i, s in enumerate(sizes)) / sum(sizes)
        raise UsageError(
            f"The cheapest choices take {least:.3f} bits a weight, more than the budget of {budget:g}.",
            f"Allow {math.ceil(least * 100) / 100:g} bits, or give a cheaper choice.",
        )
    chosen = [hull[0] for hull in hulls]
    room = _descend(chosen, hulls, errors, sizes, bits, room)
    _fill(chosen, errors, sizes, bits, room)
    return chosen


def _hull(errors: Sequence[float], bits: Sequence[float]) -> list[int]:
    """Choices on the lower convex hull, by rising bits and falling errors."""
    hull: list[int] = []
    for new in sorted(range(len(errors)), key=lambda c: (bits[c], errors[c])):
        if hull and errors[new] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(errors, bits, hull[-2], hull[-1]) >= _slope(errors, bits, hull[-2], new):
            hull.pop()
        hull.append(new)
    return hull


def _slope(errors: Sequence[float], bits: Sequence[float], a: int, b: int) -> float:
    """Error for a bit, from choice a to b: negative, the lower the better."""
    return (errors[b] - errors[a]) / (bits[b] - bits[a])


def _descend(
    chosen: list[int],
    hulls: Sequence[Sequence[int]],
    errors: Sequence[Sequence[float]],
    sizes: Sequence[int],
    bits: Sequence[Sequence[float]],
    room: float,
) -> float:
    """Take the steps of all hulls, steepest first, as long as they fit. Returns the bits that are left."""
    queue: list[tuple[float, int, int]] = []

    def offer(i: int, at: int) -> None:
        if at + 1 < len(hulls[i]):
            slope = _slope(errors[i], bits[i], hulls[i][at], hulls[i][at + 1])
            heapq.heappush(queue, (slope / sizes[i], i, at))

    for i in range(len(hulls)):
        offer(i, 0)
    while queue:
        _, i, at = heapq.heappop(queue)
        cost = sizes[i] * (bits[i][hulls[i][at + 1]] - bits[i][hulls[i][at]])
        if cost <= room:
            room -= cost
            chosen[i] = hulls[i][at + 1]
            offer(i, at + 1)
    return room


def _fill(
    chosen: list[int],
    errors: Sequence[Sequence[float]],
    sizes: Sequence[int],
    bits: Sequence[Sequence[float]],
    room: float,
) -> None:
    """Spend what is left: again and again the single change that gains most and fits."""
    while True:
        best: tuple[float, int, int, float] | None = None
        for i, now in enumerate(chosen):
            for c, error in enumerate(errors[i]):
                gain, cost = errors[i][now] - error, sizes[i] * (bits[i][c] - bits[i][now])
                if gain > 0 and cost <= room and (best is None or gain > best[0]):
                    best = (gain, i, c, cost)
        if best is None:
            return
        _, i, c, cost = best
        chosen[i] = c
        room -= cost
