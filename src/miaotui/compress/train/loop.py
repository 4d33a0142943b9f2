"""The trainer: read a batch, descend, and now and then judge and save. What it reads decides what it computes.

A run that was killed goes on from its newest checkpoint with the same batches and the same numbers, to the bit.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from miaotui.compress.train.batches import Batches
from miaotui.compress.train.corpus import Corpus
from miaotui.compress.train.group import Group
from miaotui.compress.train.journal import Journal
from miaotui.compress.train.judging import Judgement, judge
from miaotui.compress.train.loader import Order, Position
from miaotui.compress.train.objective import Objective, Rows, Sums, Windows
from miaotui.compress.train.on_policy import OnPolicy
from miaotui.compress.train.privacy import Private
from miaotui.compress.train.schedule import Pace
from miaotui.compress.train.settings import Settings
from miaotui.compress.train.state import Snapshot, Store, optimiser_tensors, restore_optimiser
from miaotui.errors import MiaotuiError

BETAS = (0.9, 0.95)
"""AdamW's (Loshchilov and Hutter 2019), as language models are trained (GPT-3, LLaMA)."""

EXPLODED, REMEMBERED, TRUSTED = 4.0, 50, 10
"""A loss over so many times the median of the last REMEMBERED has exploded, once there are TRUSTED of them."""
ROLLBACKS, SMALLER = 3, 0.5
"""So often a training goes back to its last checkpoint, each time with so much of its rate."""


@dataclass
class Progress:
    """Where a training is. recent: the last losses, from which it is seen that one explodes."""

    step: int = 0
    rollbacks: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)


class Trainer:
    """One training, from its start or from its newest checkpoint, to its end."""

    def __init__(
        self,
        objective: Objective,
        corpora: Sequence[Corpus],
        settings: Settings,
        store: Store,
        journal: Callable[[int], Journal],
        *,
        group: Group | None = None,
        on_policy: OnPolicy | None = None,
        private: Private | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        """journal: opened for the first step that is told. tell: (steps done, in all), after each."""
        self.objective = objective
        self.student = objective.student
        self.corpora = corpora
        self.settings = settings
        self.store = store
        self.group = group or Group()
        self.on_policy = on_policy
        self.private = private
        self.tell = tell or (lambda done, total: None)
        self.parameters = objective.parameters()
        self.optimiser = _optimiser(self.parameters, settings)
        self.pace = Pace()
        self.progress = Progress()
        self.judgements: list[Judgement] = []
        self.best: dict[str, torch.Tensor] | None = None
        weights = [task.weight for task in settings.tasks]
        self.order = Order(corpora, weights, settings.seed, poisson=private is not None)
        self.journal = self._open(journal)

    # -- the loop ----------------------------------------------------------------------------------------
    def train(self) -> None:
        """Train to the end; the student has the best weights then, or the last where nothing is held out.

        Raises MiaotuiError where the loss explodes again and again.
        """
        settings = self.settings
        try:
            if not self.judgements and settings.held_out:
                self._judge()
            while self.progress.step < settings.steps and not self.pace.tired(settings):
                self._step()
                self.tell(self.progress.step, settings.steps)
        finally:
            self.batches.close()
            self.journal.close()
        if self.best is not None:
            self._put(self.best)

    def _step(self) -> None:
        """One step with all that follows from it, or back to the last checkpoint."""
        progress, settings = self.progress, self.settings
        started = time.perf_counter()
        loss, norm = self._descend(self.batches.next(self.student, self.progress.step))
        if self._exploded(loss, norm):
            self._roll_back(loss)
            return
        progress.step += 1
        progress.seconds += time.perf_counter() - started
        self._note(loss, norm)
        if progress.step % settings.evaluate_every == 0 or progress.step == settings.steps:
            self._judge()
        if progress.step % settings.save_every == 0:
            self._save()

    def _descend(self, windows: Windows) -> tuple[float, float]:
        """One step, unless its loss or gradient is not finite; both are given back."""
        loss, norm = self._gradient(windows) if self.private is None else self._private_gradient(windows)
        if self._exploded(loss, norm):
            return loss, norm
        for group in self.optimiser.param_groups:
            group["lr"] = self.pace.rate(self.progress.step, self.settings)
        self.optimiser.step()
        self.student.refresh()
        return loss, norm

    def _gradient(self, windows: Windows) -> tuple[float, float]:
        self.optimiser.zero_grad(set_to_none=True)
        rows = Rows.of(self.settings.batch, self.batches.own, self.settings.window)
        sums: Sums = dict.fromkeys(self.objective.weights, 0.0)
        for piece in windows.pieces(self.settings.micro_batch):
            for name, value in self.objective.learn(piece, rows).items():
                sums[name] += value
        parameters = list(self.parameters.values())
        self.group.add_gradients(parameters)
        sums = dict(zip(sums, self.group.add(list(sums.values())), strict=True))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        return self.objective.loss(sums, rows), float(norm)

    def _private_gradient(self, windows: Windows) -> tuple[float, float]:
        """The loss is not told: it is the text's, and no noise is on it."""
        assert self.private is not None
        self.optimiser.zero_grad(set_to_none=True)
        parameters = list(self.parameters.values())
        self.private.begin(parameters)
        for piece in windows.pieces(1):
            self.objective.learn(piece, Rows.of(1, 0, self.settings.window))
            self.private.add()
        self.private.end()
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        return 0.0, float(norm)

    # -- judging -----------------------------------------------------------------------------------------
    def _judge(self) -> None:
        """Measure on what is held out; keep the weights when they are the best."""
        if not self.settings.held_out:
            self._say_step(None)
            return
        judged = judge(self.objective, self.corpora, self.settings, self.group, self.progress.step)
        self.judgements.append(judged)
        told = {"held_out/loss": judged.loss, "held_out/cross_entropy": judged.cross_entropy}
        self.journal.numbers(self.progress.step, told)
        if self.pace.judge(judged.loss, self.progress.step, self.settings):
            self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._say_step(judged)

    def _say_step(self, judged: Judgement | None) -> None:
        progress, settings = self.progress, self.settings
        parts = [f"step {progress.step}/{settings.steps}"]
        if progress.recent and self.private is None:
            parts.append(f"loss {statistics.fmean(progress.recent[-settings.evaluate_every :]):.4f}")
        if judged is not None:
            parts.append(f"held out {judged.loss:.4f} (perplexity {math.exp(min(judged.cross_entropy, 99)):.2f})")
        if self.private is not None:
            parts.append(f"ε {self.private.epsilon:.2f}")
        tokens = progress.step * settings.batch * settings.window
        self.journal.say(", ".join(parts) + f", {tokens / max(progress.seconds, 1e-9):,.0f} tokens/s")

    def _note(self, loss: float, norm: float) -> None:
        progress = self.progress
        told = {"train/rate": self.pace.rate(progress.step - 1, self.settings)}
        if self.private is None:
            progress.recent = [*progress.recent, loss][-REMEMBERED:]
            told |= {"train/loss": loss, "train/gradient": norm}
        else:
            told["train/epsilon"] = self.private.epsilon
        self.journal.numbers(progress.step, told)

    # -- when it goes wrong ------------------------------------------------------------------------------
    def _exploded(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        recent = self.progress.recent
        return len(recent) >= TRUSTED and loss > EXPLODED * statistics.median(recent)

    def _roll_back(self, loss: float) -> None:
        """To the last checkpoint, with a smaller rate, past the batches that led here (PaLM, Chowdhery et al. 2022,
        section 5.1). Raises MiaotuiError the fourth time."""
        what = f"the loss exploded ({loss:.4g})" if math.isfinite(loss) else "the loss is no number any more"
        at = self.progress.step + 1
        if self.private is not None:
            raise MiaotuiError(
                f"At step {at} {what}, and private training cannot be taken back.", "Start again with a smaller --rate."
            )
        if self.progress.rollbacks >= ROLLBACKS:
            raise MiaotuiError(
                f"At step {at} {what}, after {ROLLBACKS} returns to a checkpoint.",
                f"Start again with a smaller --rate than {self.settings.rate:g}, a longer --warmup, or a lower --clip.",
            )
        rollbacks = self.progress.rollbacks + 1
        snapshot = self.store.load()
        assert snapshot is not None, "a training saves before its first step"
        _, self.batches.pool = self._restore(snapshot)
        self.progress.rollbacks = rollbacks
        self.pace.scale *= SMALLER
        self.journal.say(
            f"step {at}: {what}; back to step {self.progress.step} with {SMALLER:g} times the rate "
            f"({rollbacks} of {ROLLBACKS})"
        )
        self._save()

    # -- checkpoints -------------------------------------------------------------------------------------
    def _open(self, journal: Callable[[int], Journal]) -> Journal:
        """Take up the newest checkpoint, or write the first."""
        snapshot = self.store.load()
        position, pool = self.order.start(), None
        if snapshot is not None:
            position, pool = self._restore(snapshot)
        opened = journal(self.progress.step + 1)
        self.batches = Batches(self.order, self.settings, self.group, self.on_policy, position, pool)
        self.group.wait()
        if snapshot is None:
            self._save()
        else:
            opened.say(f"going on from step {self.progress.step}")
        return opened

    def _save(self) -> None:
        if self.group.first:
            self.store.save(self._snapshot(self.batches.position))
        self.group.wait()

    def _snapshot(self, at: Position) -> Snapshot:
        names = {value: name for name, value in self.parameters.items()}
        tensors = {f"weights/{name}": value for name, value in self.parameters.items()}
        tensors |= {f"optimiser/{k}": v for k, v in optimiser_tensors(self.optimiser, names).items()}
        tensors["random"] = torch.get_rng_state()
        if self.batches.pool is not None:
            tensors["pool"] = torch.from_numpy(self.batches.pool)
        values: dict[str, Any] = {
            "progress": asdict(self.progress),
            "pace": {**asdict(self.pace), "best": None if math.isinf(self.pace.best) else self.pace.best},
            "position": {"batch": at.batch, "drawn": list(at.drawn)},
            "judgements": [asdict(judgement) for judgement in self.judgements],
        }
        if self.private is not None:
            tensors["noise"] = self.private.generator.get_state()
            values["privacy"] = self.private.history
        return Snapshot(tensors, values, self.best)

    def _restore(self, snapshot: Snapshot) -> tuple[Position, NDArray[np.int32] | None]:
        """Everything but what is read, which is given back."""
        tensors, values = snapshot.tensors, snapshot.values
        self._put({name.removeprefix("weights/"): v for name, v in tensors.items() if name.startswith("weights/")})
        moments = {n.removeprefix("optimiser/"): v for n, v in tensors.items() if n.startswith("optimiser/")}
        restore_optimiser(self.optimiser, self.parameters, moments)
        torch.set_rng_state(tensors["random"])
        self.progress = Progress(**values["progress"])
        pace = values["pace"]
        self.pace = Pace(**{**pace, "best": math.inf if pace["best"] is None else pace["best"]})
        self.judgements = [Judgement(**entry) for entry in values["judgements"]]
        self.best = snapshot.best
        if self.private is not None:
            self.private.generator.set_state(tensors["noise"])
            self.private.history = values["privacy"]
        pool = tensors["pool"].numpy() if "pool" in tensors else None
        return Position(values["position"]["batch"], tuple(values["position"]["drawn"])), pool

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, value in weights.items():
            self.parameters[name].copy_(value)
        self.student.refresh()


def _optimiser(parameters: dict[str, torch.Tensor], settings: Settings) -> torch.optim.Optimizer:
    """AdamW; what has one dimension (norms, biases) does not decay."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=BETAS, fused=True)
