"""Figures as people read them, in sentences."""

from __future__ import annotations

from miaotui.accelerate.card.schema import Floor
from miaotui.measure.intervals import Estimate


def loss_sentence(floor: Floor) -> str:
    """`loses 3.1% perplexity (95%: +2.6% to +3.7%), over the floor of 1%`."""
    ratio = floor.ratio
    assert ratio is not None
    change = ratio.value - 1
    verb = f"loses {percent(change)}" if change >= 0 else f"gains {percent(-change)}"
    interval = (
        "" if ratio.low is None or ratio.high is None else f" (95%: {ratio.low - 1:+.2%} to {ratio.high - 1:+.2%})"
    )
    judged = {"holds": "within", "broken": "over", "undecided": "which cannot be told from"}[floor.verdict]
    return f"{verb} perplexity{interval}, {judged} the floor of {percent(floor.loss)}"


def times(gain: Estimate) -> str:
    interval = "" if gain.low is None or gain.high is None else f" (95%: {gain.low:.2f} to {gain.high:.2f})"
    return f"{gain.value:.2f}×{interval}"


def percent(share: float) -> str:
    return f"{100 * share:.3g}%" if share >= 1e-4 or share == 0 else "under 0.01%"
