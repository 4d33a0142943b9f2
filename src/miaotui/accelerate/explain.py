"""Why each technique was kept or dropped, in sentences with the figures that decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from miaotui.accelerate.card.schema import Technique
from miaotui.accelerate.card.wording import loss_sentence, times
from miaotui.accelerate.search.attempt import Attempt
from miaotui.accelerate.search.search import Outcome
from miaotui.accelerate.search.space import DEFAULT, RECODED, Candidate, Space
from miaotui.compress.recipe import parse_scheme

DIMENSIONS = ("scheme", "method", "table", "blocks")
"""Of weights; those of serving are LLM's options."""


def techniques(outcome: Outcome, space: Space) -> tuple[Technique, ...]:
    """Of what was tried, what was left out unseen, and what is not for this machine: each once, what was kept first."""
    found = [*_weights(outcome), *_servings(outcome), *_unseen(outcome)]
    found += [Technique(name, False, _sentence(why)) for name, why in space.dropped]
    once: dict[str, Technique] = {}
    for technique in sorted(found, key=lambda t: not t.kept):
        once.setdefault(technique.name, technique)
    return tuple(once.values())


def verdict(outcome: Outcome) -> str:
    """What came of it, in one sentence."""
    winner, floor = outcome.winner, outcome.plan.floor
    if winner is not None:
        assert winner.confirmation is not None
        return f"{winner.name}: {winner.why}."
    closest = outcome.closest
    said = f"Keep the original: nothing tried is better at {outcome.plan.goal} within the floor of {100 * floor:g}%"
    if closest is None:
        return f"{said}."
    return f"{said}; the closest is {closest.name}: {_fate(closest)}."


# -- by kind ---------------------------------------------------------------------------------------------
def _weights(outcome: Outcome) -> Iterator[Technique]:
    """Every scheme, method and table that was tried, by its best attempt."""
    plain = [a for a in outcome.attempts if a.candidate.recipe is not None and _default(a)]
    winner = None if outcome.winner is None else outcome.winner.candidate
    for dimension in DIMENSIONS:
        for choice in dict.fromkeys(a.candidate.features()[dimension] for a in plain):
            best = _best([a for a in plain if a.candidate.features()[dimension] == choice])
            kept = winner is not None and winner.features()[dimension] == choice
            rival = None if kept or outcome.winner is None else outcome.winner
            name = words(dimension, choice)
            if name:
                yield Technique(name, kept, _sentence(_told(best, rival)))


def _servings(outcome: Outcome) -> Iterator[Technique]:
    """Every other way to serve that was tried."""
    winner = None if outcome.winner is None else outcome.winner.candidate
    for attempt in outcome.attempts:
        options = attempt.candidate.serving.options()
        for option, value in options.items():
            if len(options) > 1 and winner != attempt.candidate:
                continue
            kept = winner is not None and winner.serving.options().get(option) == value
            yield Technique(words(option, str(value)), kept, _sentence(_fate(attempt)))


def _unseen(outcome: Outcome) -> Iterator[Technique]:
    """Schemes and depths of which nothing was tried, with what was said of the one that was left out last."""
    for dimension in ("scheme", "blocks"):
        tried = {a.candidate.features()[dimension] for a in outcome.attempts}
        for candidate, why in reversed(outcome.skipped):
            choice = candidate.features()[dimension]
            name = words(dimension, choice)
            if name and choice not in tried:
                tried.add(choice)
                yield Technique(name, False, _sentence(f"not tried: {why}"))


# -- sentences -------------------------------------------------------------------------------------------
def words(dimension: str, choice: str) -> str:
    """A choice for people; nothing for what is no technique."""
    match dimension:
        case "scheme":
            return _scheme_words(choice)
        case "method":
            return f"rounding by {choice}"
        case "table":
            return "" if choice == "keep" else f"tokens' table and head in {choice}"
        case "blocks":
            return "" if choice == "all" else f"{choice} layers left"
        case "compute":
            return RECODED if choice == "int8-batch" else f"{choice} activations"
        case "kv_cache_dtype":
            return f"{choice} cache"
        case "speculative":
            return f"guessing tokens by {choice}"
        case "threads":
            return f"{choice} threads"
        case "max_num_seqs":
            return f"{choice} sequences at most in a step"
        case "max_num_batched_tokens":
            return f"{choice} tokens at most in a step"
        case "greedy_screen":
            return "" if choice == "True" else "a head without its screen"
    raise AssertionError(f"no words for {dimension}")


def _scheme_words(choice: str) -> str:
    if choice.endswith(" bits"):
        return f"mixed precision of {choice}"
    weights = parse_scheme(choice).weights
    assert weights is not None
    group = "whole rows" if weights.group_size is None else f"groups of {weights.group_size}"
    return f"int{weights.bits} weights in {group}{'' if weights.symmetric else ', with minima'}"


def _told(attempt: Attempt, rival: Attempt | None) -> str:
    """An attempt's fate; beside a rival, what it costs in speed or could have gained."""
    fate = _fate(attempt)
    if rival is None or attempt.failed:
        return fate
    if attempt.gain is not None and rival.gain is not None:
        share = attempt.value / rival.value - 1
        if abs(share) >= 0.005:
            return f"{fate}, {abs(share):.0%} {'faster' if share > 0 else 'slower'} than what was kept"
    return fate


def _fate(attempt: Attempt) -> str:
    if attempt.failed or attempt.refuted or attempt.confirmation is not None:
        return attempt.why
    parts = [] if attempt.ratio is None or attempt.exact else [loss_sentence(attempt.floor)]
    if attempt.gain is not None:
        parts.append(f"{times(attempt.gain)} the original")
    return "; ".join(parts) or attempt.why


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text and text[-1] != "." else text[:1].upper() + text[1:]


def _best(attempts: Sequence[Attempt]) -> Attempt:
    """The fastest of those that may win, else the one that loses least."""
    standing = [a for a in attempts if a.stands]
    if standing:
        return max(standing, key=lambda a: (a.won, a.value))
    return min(attempts, key=lambda a: a.ratio.value if a.ratio is not None else float("inf"))


def _default(attempt: Attempt) -> bool:
    """Whether it is served by default, but for how it computes."""
    return (
        attempt.candidate == Candidate(attempt.candidate.recipe, DEFAULT)
        or attempt.won
        or (set(attempt.candidate.serving.options()) <= {"compute", "greedy_screen"})
    )
