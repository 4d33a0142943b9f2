"""How good a student is on windows that it never learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from miaotui.compress.train.corpus import Corpus
from miaotui.compress.train.group import Group
from miaotui.compress.train.objective import Objective, Rows, Sums, Windows
from miaotui.compress.train.settings import Settings


@dataclass(frozen=True)
class Judgement:
    """On held-out windows: the loss that is trained, and cross-entropy in nats a token."""

    step: int
    loss: float
    cross_entropy: float


def judge(objective: Objective, corpora: Sequence[Corpus], settings: Settings, group: Group, step: int) -> Judgement:
    """Measure the student as it is; processes share the windows, and tasks count by their weights."""
    loss = cross_entropy = 0.0
    total = sum(task.weight for task in settings.tasks)
    for task, corpus in zip(settings.tasks, corpora, strict=True):
        sums = _sums(objective, corpus, settings, group)
        rows = Rows.of(len(corpus.held), 0, settings.window)
        loss += task.weight / total * objective.loss(sums, rows)
        cross_entropy += task.weight / total * sums["ce"] / rows.true
    return Judgement(step, loss, cross_entropy)


def _sums(objective: Objective, corpus: Corpus, settings: Settings, group: Group) -> Sums:
    """Of one task's terms, over all processes."""
    sums: Sums = dict.fromkeys(["ce", *objective.weights], 0.0)
    tokens = np.array(corpus.windows[corpus.held[group.rank :: group.size]], np.int32)
    held = torch.from_numpy(tokens).to(settings.device)
    windows = Windows(held, torch.zeros(len(held), dtype=torch.bool, device=held.device))
    for piece in windows.pieces(settings.micro_batch or settings.batch):
        for name, value in objective.measure(piece).items():
            sums[name] += value
    return dict(zip(sums, group.add(list(sums.values())), strict=True))
