"""Which candidate next, where there are more than time allows: a Parzen estimator learns from those that were tried.

Optuna's tree-structured one, TPE, with its handling of constraints (Bergstra et al. 2011; Watanabe and Hutter 2023).
The study is made anew from the finished trials at each question and seeded by their number, so that the answer depends
on nothing else: a search that was killed asks the same things again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from miaotui.accelerate.search.space import Candidate

if TYPE_CHECKING:
    import optuna

ASKED = 24
"""Proposals that are drawn for one that was not tried yet."""
ENOUGH = 6
"""Finished trials from which there is something to learn from."""


@dataclass(frozen=True)
class Tried:
    """A finished trial: its gain, and by how much it breaks the floor (0 or less: it keeps it)."""

    candidate: Candidate
    gain: float
    excess: float


class Pick(Protocol):
    """Chooses the next of the `remaining` candidates, which are in the order of their predicted gain."""

    def __call__(self, remaining: Sequence[Candidate], tried: Sequence[Tried], *, fits: int) -> Candidate: ...


def in_order(remaining: Sequence[Candidate], tried: Sequence[Tried], *, fits: int) -> Candidate:
    """The one with the highest predicted gain."""
    return remaining[0]


class Sampler:
    """The predicted best while there is time for all of them, or too little is known; else what TPE proposes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, remaining: Sequence[Candidate], tried: Sequence[Tried], *, fits: int) -> Candidate:
        if fits >= len(remaining) or len(tried) < ENOUGH:
            return remaining[0]
        return self._proposed(remaining, tried) or remaining[0]

    def _proposed(self, remaining: Sequence[Candidate], tried: Sequence[Tried]) -> Candidate | None:
        known = [*remaining, *(one.candidate for one in tried)]
        choices = _choices([candidate.features() for candidate in known])
        if not choices:
            return None
        study = _study(tried, choices, self._seed + len(tried))
        untried = {_point(candidate.features(), choices): candidate for candidate in reversed(remaining)}
        for _ in range(ASKED):
            asked = study.ask(dict(choices))
            found = untried.get(tuple(asked.params[name] for name in choices))
            if found is not None:
                return found
        return None


def _choices(features: Sequence[Mapping[str, str]]) -> dict[str, optuna.distributions.CategoricalDistribution]:
    """The dimensions in which candidates differ."""
    from optuna.distributions import CategoricalDistribution

    every = {name: sorted({found[name] for found in features}) for name in features[0]}
    return {name: CategoricalDistribution(values) for name, values in every.items() if len(values) > 1}


def _point(features: Mapping[str, str], choices: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(features[name] for name in choices)


def _study(
    tried: Sequence[Tried], choices: dict[str, optuna.distributions.CategoricalDistribution], seed: int
) -> optuna.Study:
    """A study that knows what was tried."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=ENOUGH)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for one in tried:
        features = one.candidate.features()
        study.add_trial(
            optuna.trial.create_trial(
                params={name: features[name] for name in choices},
                distributions=dict(choices),
                value=one.gain,
                constraints={"floor": one.excess},
            )
        )
    return study
