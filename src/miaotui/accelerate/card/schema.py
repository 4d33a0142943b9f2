"""card.json: what was measured of a model and of the artefact made from it, whole and checked.

The words are those of the reports that it is made from: a `Speed` has the keys of a result of `miaotui bench --json`,
a `Quality` the figures of `miaotui evaluate --json`, a `Profile` the keys of a case of `bench --profile --json`, and
a `Peer` those of `benchmarks/peers.py`. Nothing in a card is an estimate but what is called so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from miaotui.compress.recipe import from_plain
from miaotui.errors import CheckpointError, MiaotuiError
from miaotui.measure.intervals import Estimate

SCHEMA_VERSION = 1
REMAKE = "Make it again with miaotui accelerate."

FloorVerdict = Literal["holds", "broken", "undecided"]
TrialState = Literal["won", "measured", "rejected", "failed"]


# -- what it is about ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Model:
    """The original: `bytes` of its weights, `fingerprint` of its files, `license` as the hub has it."""

    name: str
    family: str
    parameters: int
    bytes: int
    fingerprint: str
    license: str | None = None
    base_model: str | None = None
    """The hub's name for it, where it has one."""


@dataclass(frozen=True)
class Technique:
    """One thing that was tried, such as `int4 weights in groups of 64`, and in a sentence why it stayed or went."""

    name: str
    kept: bool
    why: str


@dataclass(frozen=True)
class Artefact:
    """What was made. `recipe` as `Recipe.plain()` gives it; None: nothing won, and the original was kept.

    `options` are those of `LLM` that it was measured with: threads, kv_cache_dtype, speculation and their like.
    """

    name: str
    bytes: int
    recipe: Mapping[str, Any] | None
    format: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    techniques: tuple[Technique, ...] = ()

    @property
    def kept_original(self) -> bool:
        return self.recipe is None


# -- figures ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Speed:
    """A regime's median of `samples` samples with its 95% interval, and this machine's ceiling in the same unit."""

    regime: str
    unit: str
    median: float
    low: float
    high: float
    samples: int
    better: Literal["higher", "lower"] = "higher"
    ceiling: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Speed:
        """From one of the `results` of a speed report."""
        return cls(**{f.name: result[f.name] for f in fields(cls) if f.name in result})

    @property
    def share(self) -> float | None:
        """How near the median is to the ceiling, 1 being there; None without a ceiling."""
        if not self.ceiling or not self.median:
            return None
        return self.median / self.ceiling if self.better == "higher" else self.ceiling / self.median

    def gain(self, before: Speed) -> float:
        """How many times as good as before: 2 is twice the tokens, or half the seconds. 0 where that has no meaning."""
        was, now = (before.median, self.median) if self.better == "higher" else (self.median, before.median)
        return now / was if was else 0.0


@dataclass(frozen=True)
class Task:
    """A task's score, such as `hellaswag`'s `acc_norm`, over `examples` of it."""

    name: str
    metric: str
    score: Estimate
    examples: int
    higher_is_better: bool = True


@dataclass(frozen=True)
class Quality:
    """What the answers are worth on `data`; all but perplexity and tasks is against the original on the same tokens."""

    data: str
    tokens: int
    windows: int
    window: int
    perplexity: Estimate
    perplexity_ratio: Estimate | None = None
    p_value: float | None = None
    kl_mean: Estimate | None = None
    kl_p99: Estimate | None = None
    top1_flips: Estimate | None = None
    greedy_agreement: Estimate | None = None
    greedy_tokens: int | None = None
    tasks: tuple[Task, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, report: Mapping[str, Any], tasks: Sequence[Task] = ()) -> Quality:
        """The model's figures in a report of `measure.quality.evaluate`."""
        names = ("perplexity_ratio", "kl_mean", "kl_p99", "top1_flips", "greedy_agreement")
        found: dict[str, Any] = {name: estimate(report, name) for name in names if name in report}
        found |= {name: report[name] for name in ("p_value", "greedy_tokens") if name in report}
        return replace(cls.of_reference({**report, "reference": report}, tasks), **found)

    @classmethod
    def of_reference(cls, report: Mapping[str, Any], tasks: Sequence[Task] = ()) -> Quality:
        """The original's figures in the same report."""
        perplexity = estimate(report["reference"], "perplexity")
        return cls(**_text(report), perplexity=perplexity, tasks=tuple(tasks), notes=tuple(report["notes"]))


@dataclass(frozen=True)
class Floor:
    """How much perplexity may rise: `loss` 0.01 is 1%. `ratio` is the paired ratio of perplexities that decided."""

    loss: float
    verdict: FloorVerdict
    ratio: Estimate | None = None

    @classmethod
    def of(cls, loss: float, ratio: Estimate) -> Floor:
        """It holds when all of the interval is below, is broken when all of it is above, and else is undecided."""
        if ratio.low is None or ratio.high is None:
            return cls(loss, "undecided", ratio)
        verdict: FloorVerdict = "undecided"
        if ratio.high <= 1 + loss:
            verdict = "holds"
        elif ratio.low > 1 + loss:
            verdict = "broken"
        return cls(loss, verdict, ratio)

    @property
    def holds(self) -> bool:
        return self.verdict == "holds"


@dataclass(frozen=True)
class Energy:
    """Joules for a new token in `regime`, as `sources` counted them; or None, and why it could not be measured."""

    joules_per_token: float | None = None
    low: float | None = None
    high: float | None = None
    regime: str | None = None
    sources: tuple[str, ...] = ()
    unavailable: str | None = None
    marks: tuple[str, ...] = ()
    """What puts the figures in doubt: throttling, heat."""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Energy:
        """From the `energy` of a speed report."""
        values = {f.name: found[f.name] for f in fields(cls) if f.name in found}
        return cls(**values | {name: tuple(values[name]) for name in ("sources", "marks")})


# -- the search ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trial:
    """One point of the search and how far it came.

    `speed` in the search's regime and `kl` (mean, nats) are measured or None; `estimated_speed` is the ceiling model's.
    `seconds` is what the trial took, `why` a sentence on its fate.
    """

    name: str
    state: TrialState
    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    speed: Speed | None = None
    kl: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    bytes: int | None = None
    estimated_speed: float | None = None
    seconds: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Search:
    """What was asked for and all that was tried. Times in seconds; `regime` is what the trials' speeds are of."""

    goal: str
    regime: str
    budget: float
    spent: float
    seed: int
    trials: tuple[Trial, ...] = ()
    baseline: Speed | None = None
    """The original's speed in that regime."""

    def front(self) -> list[Trial]:
        """The measured trials that no other beats in both speed and KL, from the most faithful on."""
        points = [trial for trial in self.trials if trial.speed is not None and trial.kl is not None]
        return sorted((p for p in points if not any(dominates(q, p) for q in points)), key=_kl)


def dominates(one: Trial, other: Trial) -> bool:
    """Whether one is at least as fast and as faithful as the other, and better in one of the two; both measured."""
    assert one.speed is not None
    assert other.speed is not None
    gain, change = one.speed.gain(other.speed), _kl(one) - _kl(other)
    return gain >= 1 and change <= 0 and (gain > 1 or change < 0)


def _kl(trial: Trial) -> float:
    assert trial.kl is not None
    return trial.kl.value


@dataclass(frozen=True)
class Sensitivity:
    """Mean KL in nats when only this is coded: a layer's linears of one role (`mlp_out`), or all of them (`all`)."""

    layer: int
    role: str
    scheme: str
    kl: float


# -- where the time goes, and who else was measured --------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """One kind of op: how many a step has, its seconds a step, and the least seconds this machine needs for it."""

    op: str
    count: int
    seconds: float
    least: float


@dataclass(frozen=True)
class Profile:
    """Where the `seconds` of a step go."""

    case: str
    seconds: float
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, case: Mapping[str, Any]) -> Profile:
        """From one of the `cases` of a report of `measure.profile.run`."""
        return cls(case["case"], case["seconds"], tuple(Line(**line) for line in case["lines"]))


@dataclass(frozen=True)
class PeerResult:
    """Medians of alternating runs, and the ratio ours ÷ theirs with its 95% interval."""

    regime: str
    unit: str
    ours: float
    theirs: float
    ratio: Estimate
    pairs: int


@dataclass(frozen=True)
class Peer:
    """Another program with the same model and prompts; without results, `why` says why it was not measured."""

    name: str
    version: str | None = None
    weights: str | None = None
    results: tuple[PeerResult, ...] = ()
    why: str | None = None


# -- before and after ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Speeds:
    """Of the original and of the artefact; `after` is empty when the original was kept."""

    before: tuple[Speed, ...]
    after: tuple[Speed, ...] = ()

    def pairs(self) -> list[tuple[Speed | None, Speed | None]]:
        """Both sides by regime, in the order of the first that has it."""
        before, after = ({speed.regime: speed for speed in side} for side in (self.before, self.after))
        return [(before.get(regime), after.get(regime)) for regime in {**before, **after}]


@dataclass(frozen=True)
class Qualities:
    """Of the original and of the artefact; `after` is None when the original was kept."""

    before: Quality
    after: Quality | None = None


@dataclass(frozen=True)
class Energies:
    before: Energy
    after: Energy | None = None

    @classmethod
    def of(cls, reports: Sequence[Mapping[str, Any]]) -> Energies:
        """From speed reports of the original and, where there is one, of the artefact."""
        without = Energy(unavailable="no regime that makes tokens was measured")
        found = [Energy.of(report["energy"]) if "energy" in report else without for report in reports]
        return cls(*found[:2])


@dataclass(frozen=True)
class Card:
    """Everything. `verdict` is one sentence; `created` an ISO time; `machine` as in a speed report, ceilings included.

    `commands` reproduce the figures; `calibration` says with what text and how much of it; `marks` in `machine` and
    `caveats` say what a reader must know before the figures.
    """

    created: str
    verdict: str
    model: Model
    artefact: Artefact
    floor: Floor
    speed: Speeds
    quality: Qualities
    search: Search
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    energy: Energies
    caveats: tuple[str, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    profile: tuple[Profile, ...] = ()
    peers: tuple[Peer, ...] = ()
    commands: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def plain(self) -> dict[str, Any]:
        """Values that JSON can hold, the version first; `parse` gives the same card again."""
        values = asdict(self)
        values = {"schema_version": values.pop("schema_version"), **values}
        plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
        return plain

    @classmethod
    def parse(cls, values: Any, where: str = "The card") -> Card:
        """From plain values. Raises CheckpointError for another version, and for a missing, unknown or wrong key."""
        if not isinstance(values, Mapping) or "schema_version" not in values:
            raise CheckpointError(f"{where} is no card: it has no schema_version.", REMAKE)
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{where} has schema_version {version!r:.20}, and this program reads {SCHEMA_VERSION}.",
                "Read it with the version of miaotui that wrote it.",
            )
        try:
            card = from_plain(cls, values, "")
            _check_numbers(card.plain())
            return card
        except (MiaotuiError, TypeError, ValueError, OverflowError, RecursionError) as error:
            cause = error.message if isinstance(error, MiaotuiError) else str(error)
            raise CheckpointError(f"{where} cannot be read: {cause}", REMAKE) from error


def _check_numbers(value: Any) -> None:
    """Raises ValueError for a number that nothing measured can have; `plain` has seen to those that are not finite."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(item)
    elif isinstance(value, (int, float)) and abs(value) >= 2**63:
        raise ValueError(f"{float(min(value, 2**63)):.3g} is too large a number.")


def estimate(report: Mapping[str, Any], name: str) -> Estimate:
    """The figure `name` of a report of `measure.quality`, with its standard error and interval."""
    stderr = report["stderr" if name == "perplexity" else f"{name}_stderr"]
    low, high = report[f"{name}_interval"] or (None, None)
    return Estimate(report[name], stderr, low, high)


def _text(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was read."""
    size = report["settings"]["window"]
    return {"data": report["data"], "tokens": report["tokens"], "windows": report["windows"], "window": size}
