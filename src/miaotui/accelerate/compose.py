"""A card from what a search found and what was measured at its end."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import miaotui
from miaotui.accelerate.card.schema import (
    Artefact,
    Card,
    Energies,
    Floor,
    Model,
    Peer,
    Profile,
    Qualities,
    Quality,
    Search,
    Sensitivity,
    Speed,
    Speeds,
    Task,
    Technique,
    Trial,
    TrialState,
    estimate,
)
from miaotui.accelerate.goals import Workload
from miaotui.accelerate.search.attempt import Attempt
from miaotui.accelerate.search.finish import Measured, regimes_of
from miaotui.accelerate.search.search import Outcome
from miaotui.accelerate.source import Source
from miaotui.hardware.sensors import BUSY
from miaotui.measure.intervals import Estimate
from miaotui.measure.work import parameters

LIBRARIES = ("numpy", "torch", "optuna", "tokenizers")
TIMES = "× original"


@dataclass(frozen=True)
class Findings:
    """Everything that a card is made of. `quality` is a report of `measure.quality.evaluate`."""

    model: Model
    source: Source
    outcome: Outcome
    load: Workload
    measured: Measured
    quality: Mapping[str, Any]
    energy: Energies
    techniques: tuple[Technique, ...]
    verdict: str
    artefact: str
    commands: tuple[str, ...]
    calibration: Mapping[str, Any]
    peers: tuple[Peer, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    tasks: Mapping[str, Any] | None = None
    """A report of `measure.tasks.evaluate`, with the original as its reference where there is a winner."""
    caveats: tuple[str, ...] = ()


def compose(found: Findings) -> Card:
    """The card."""
    outcome, winner, reports = found.outcome, found.outcome.winner, found.measured.speeds
    sides = [tuple(Speed.of(result) for result in regimes_of(report)) for report in reports]
    before, after = sides[0], sides[1] if len(sides) > 1 else ()
    floor = Floor(outcome.plan.floor, "undecided")
    after_quality = None
    if winner is not None:
        assert winner.confirmation is not None
        floor = Floor.of(outcome.plan.floor, winner.confirmation.ratio)
        after_quality = Quality.of(found.quality, tasks_of(found.tasks, "score"))
    original_tasks = tasks_of(found.tasks, "score" if winner is None else "reference_score")
    shown = found.measured.profile
    return Card(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=found.verdict,
        model=found.model,
        artefact=_artefact(found, winner),
        floor=floor,
        speed=Speeds(before, after),
        quality=Qualities(Quality.of_reference(_with_reference(found.quality), original_tasks), after_quality),
        search=_search(outcome, found.load),
        machine=reports[-1]["machine"],
        versions=_versions(),
        energy=found.energy,
        caveats=(*_caveats(found, reports), *found.caveats),
        sensitivity=found.sensitivity,
        profile=() if shown is None else tuple(Profile.of(case) for case in shown["cases"]),
        peers=found.peers,
        commands=found.commands,
        calibration=found.calibration,
    )


def model_of(name: str, source: Source, fingerprint: str, about: Mapping[str, Any]) -> Model:
    """What a card says of the original; `about` is its front matter: license and base_model where it has them."""
    spec = source.spec
    return Model(
        name,
        spec.family,
        parameters(spec),
        source.weight_bytes,
        fingerprint,
        _text(about.get("license")),
        _text(about.get("base_model")),
    )


def tasks_of(report: Mapping[str, Any] | None, which: str) -> tuple[Task, ...]:
    """The scores of a report on tasks, or its reference's."""
    return tuple(
        Task(one["task"], one["metric"], estimate(one, which), one["examples"], one["better"] == "higher")
        for one in (() if report is None else report["tasks"])
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _artefact(found: Findings, winner: Attempt | None) -> Artefact:
    if winner is None:
        return Artefact(found.artefact, found.source.weight_bytes, None, techniques=found.techniques)
    candidate = winner.candidate
    recipe = candidate.recipe
    size = found.source.weight_bytes if winner.built is None else winner.built.bytes
    plain: dict[str, Any] = {} if recipe is None else recipe.plain()
    return Artefact(
        found.artefact,
        size,
        plain,
        found.source.format if recipe is None else recipe.format,
        candidate.serving.options(),
        found.techniques,
    )


# -- the search ------------------------------------------------------------------------------------------
def _search(outcome: Outcome, load: Workload) -> Search:
    plan = outcome.plan
    regime = load.name(plan.goal)
    trials = tuple(trial_of(attempt, regime) for attempt in outcome.attempts)
    baseline = Speed(regime, TIMES, 1.0, 1.0, 1.0, 1)
    return Search(plan.goal, regime, plan.budget, outcome.spent, plan.seed, trials, baseline)


def trial_of(attempt: Attempt, regime: str) -> Trial:
    """An attempt as a card has it. Speeds are how many times the original's, as `Attempt.gain` has them."""
    return Trial(
        attempt.name,
        _state(attempt),
        attempt.stage,
        {name: value for name, value in attempt.candidate.features().items() if value not in ("None",)},
        _speed(attempt.gain, regime, len(attempt.duel)),
        _divergence(attempt),
        attempt.ratio,
        None if attempt.built is None else attempt.built.bytes,
        attempt.predicted,
        attempt.seconds,
        f"{attempt.why[:1].upper()}{attempt.why[1:]}{'' if attempt.why.endswith('.') else '.'}",
    )


def _state(attempt: Attempt) -> TrialState:
    if attempt.won:
        return "won"
    if attempt.failed:
        return "failed"
    return "measured" if attempt.gain is not None else "rejected"


def _speed(gain: Estimate | None, regime: str, rounds: int) -> Speed | None:
    if gain is None:
        return None
    low = gain.value if gain.low is None else gain.low
    high = gain.value if gain.high is None else gain.high
    return Speed(regime, TIMES, gain.value, low, high, rounds)


def _divergence(attempt: Attempt) -> Estimate | None:
    return Estimate(0.0, None, None, None) if attempt.exact else attempt.scores.divergence


# -- around it -------------------------------------------------------------------------------------------
def _with_reference(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """A report of the original alone is its own reference."""
    return report if "reference" in report else {**report, "reference": report}


def _caveats(found: Findings, reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before the figures."""
    caveats = [*([found.source.caveat] if found.source.caveat else []), *found.outcome.notes, *found.measured.notes]
    others = max(report["machine"]["disturbance"]["others"] for report in reports)
    if others >= BUSY:
        caveats.append(f"Other processes took {others:.1f} cores while the regimes were measured: speeds are low.")
    winner = found.outcome.winner
    if winner is not None and winner.confirmation is not None and winner.confirmation.duel.others >= BUSY:
        taken = winner.confirmation.duel.others
        caveats.append(f"Other processes took {taken:.1f} cores during the last duel; its rounds alternate.")
    if winner is not None and winner.candidate.serving.compute == "int8-batch":
        caveats.append(
            "Served so, a stream's answer may depend on how many others run with it: steps of 16 tokens and more are"
            " computed on recoded weights. `--compute auto` serves the same weights without."
        )
    if winner is not None and winner.candidate.serving.speculative:
        caveats.append(
            "The figures of single regimes, and those against other engines, are without guessed tokens: what guesses"
            " gain depends on the text. The gain over the original is with them, for drawn answers to prompts from the"
            " text that was calibrated on."
        )
    throttled = max(report["machine"]["disturbance"]["throttled"] for report in reports)
    if throttled:
        caveats.append(f"The processor slowed itself down {throttled} times while the regimes were measured.")
    once = {one["regime"]: None for report in reports for one in regimes_of(report) if one["samples"] == 1}
    if once:
        caveats.append(f"Measured once in this budget, and so without an interval: {', '.join(once)}.")
    if found.measured.left_out:
        caveats.append(
            f"Not measured in this budget: {', '.join(found.measured.left_out)}. `miaotui bench` measures them."
        )
    return caveats


def _versions() -> dict[str, str]:
    versions = {"miaotui": miaotui.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
