"""What a training is asked for: frozen, checked, and the same for all processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from miaotui.errors import UsageError

Schedule = Literal["cosine", "plateau"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Task:
    """A text to learn from, and how often its windows are drawn beside the other tasks'. source None: our own prose."""

    source: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(f"The weight of {self.source} is {self.weight}.", "Give a positive number.")


@dataclass(frozen=True)
class Terms:
    """The loss of a token: ce · cross-entropy + kl · T²·KL(teacher ‖ student) + hidden · mean relative distance of
    hidden states. top: only so many of the teacher's likeliest tokens are told apart (None: all)."""

    ce: float = 0.0
    kl: float = 1.0
    hidden: float = 0.0
    temperature: float = 1.0
    top: int | None = None

    def __post_init__(self) -> None:
        weights = {"ce": self.ce, "kl": self.kl, "hidden": self.hidden}
        for name, value in weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"The weight of {name} is {value}.", "Give a number of at least 0.")
        if not any(weights.values()):
            raise UsageError("All terms of the loss have the weight 0.", "Give --kl, --ce or --hidden a weight.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"The temperature is {self.temperature}.", "Give a positive number, such as 2.")
        if self.top is not None and self.top < 1:
            raise UsageError(f"{self.top} of the teacher's tokens are told apart.", "Give at least 1.")

    @property
    def taught(self) -> bool:
        """Whether there is anything that a teacher says."""
        return self.kl > 0 or self.hidden > 0


@dataclass(frozen=True)
class Privacy:
    """(ε, δ)-differential privacy of each window of the text, by DP-SGD (Abadi et al. 2016)."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise UsageError(f"ε is {self.epsilon}.", "Give a positive number, such as 3.")
        if not 0 < self.delta < 1:
            raise UsageError(f"δ is {self.delta}.", "Give a number far below 1 / the windows of the text.")


@dataclass(frozen=True)
class Settings:
    """steps: of `batch` windows of `window` tokens, over all processes; `micro_batch` windows at once (None: all).

    rate: AdamW's, after `warmup` steps; then by `schedule`: a cosine down to a tenth, or halved when three
    evaluations brought nothing. clip: the gradient's largest norm. on_policy: share of the windows that the student
    has written itself, with what it knew at most `on_policy_every` steps ago. held_out: share of the windows that
    nothing is learnt from, by which the best weights are chosen, every `evaluate_every` steps; training ends after
    `patience` evaluations without a better one (None: never early).
    recompute: keep less for the gradient, and compute it again.
    """

    tasks: tuple[Task, ...] = (Task(),)
    terms: Terms = Terms()
    window: int = 256
    steps: int = 500
    batch: int = 8
    micro_batch: int | None = None
    rate: float = 3e-4
    warmup: int = 20
    schedule: Schedule = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    on_policy: float = 0.0
    on_policy_every: int = 50
    held_out: float = 0.05
    evaluate_every: int = 50
    patience: int | None = None
    save_every: int = 100
    seed: int = 0
    precision: Precision = "auto"
    recompute: bool = False
    device: str = "cpu"
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "on_policy_every", "evaluate_every", "save_every", "micro_batch", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}.", "Give a whole number of at least 1.")
        if self.window < 2:
            raise UsageError(f"A window of {self.window} tokens predicts none.", "Give at least 2.")
        for name in ("rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UsageError(f"{name} is {getattr(self, name)}.", "Give a positive number.")
        if self.warmup < 0 or self.weight_decay < 0:
            raise UsageError("Neither warm-up nor weight decay can be negative.", "Give at least 0.")
        if not 0 <= self.on_policy <= 1:
            raise UsageError(f"The share of on-policy windows is {self.on_policy}.", "Give a number from 0 to 1.")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"The share that is held out is {self.held_out}.", "Give a number from 0 to below 1.")
        if not self.tasks:
            raise UsageError("There is nothing to learn from.", "Give a text.")
        self._check_together()

    def _check_together(self) -> None:
        """Settings that mean nothing without, or beside, another."""
        if not self.held_out and (self.schedule == "plateau" or self.patience is not None):
            raise UsageError(
                "Reducing on a plateau and stopping early go by the held-out loss, and nothing is held out.",
                "Give --held-out a share, or leave out --schedule plateau and --patience.",
            )
        if self.on_policy and not self.terms.taught:
            raise UsageError(
                "What the student wrote is not worth learning without a teacher's opinion.",
                "Leave out --on-policy, or give a teacher.",
            )
        if self.privacy is not None:
            _check_accountable(self)


def _check_accountable(settings: Settings) -> None:
    """Refuse what reads the text without being counted in ε. Raises UsageError."""
    refused = {
        "tasks mixed by weight": len(settings.tasks) > 1,
        "windows that the student wrote after pieces of the text": settings.on_policy > 0,
        "held-out windows, whose loss is shown and chosen by": settings.held_out > 0,
    }
    for what, asked in refused.items():
        if asked:
            raise UsageError(
                f"Differential privacy cannot account for {what}.",
                "Give one text, --held-out 0, and no --on-policy.",
            )


def plain(settings: object) -> dict[str, object]:
    """Settings as plain values, for reports and fingerprints."""
    found: dict[str, object] = {}
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if isinstance(value, tuple):
            value = [plain(item) for item in value]
        elif isinstance(value, (Terms, Privacy)):
            value = plain(value)
        found[field.name] = value
    return found
