"""What the terms of the loss add up to over windows, and its gradient.

Logits are made, compared and forgotten a few rows at a time: with a vocabulary of 150 000, those of one window of 1024
tokens would take 600 MB, of both models and their gradients 2 GB.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from miaotui.compress.train import losses, network
from miaotui.compress.train.settings import Terms
from miaotui.compress.train.student import Student
from miaotui.compress.train.teacher import Teacher

LOGITS_AT_ONCE = 1 << 22
"""Logits that exist at a time."""
STATES = 4
"""Hidden states that are compared at most, evenly over the depth, the last one among them."""

Sums = dict[str, float]
"""Sums over rows of each term that has a weight, by its name."""


@dataclass(frozen=True, eq=False)
class Windows:
    """tokens `[windows, length]` and, of each window, whether the student wrote it: nothing says that it is right."""

    tokens: torch.Tensor
    own: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def pieces(self, size: int | None) -> Iterator[Windows]:
        step = size or max(1, len(self))
        for start in range(0, len(self), step):
            yield Windows(self.tokens[start : start + step], self.own[start : start + step])


@dataclass(frozen=True)
class Rows:
    """Predictions that the terms are averaged over: all, and those with a true next token."""

    all: int
    true: int

    @classmethod
    def of(cls, windows: int, own: int, length: int) -> Rows:
        return cls(windows * (length - 1), (windows - own) * (length - 1))

    def count(self, term: str) -> int:
        return self.true if term == "ce" else self.all


@dataclass(eq=False)
class Objective:
    """The loss of one student, with or without a teacher. `projectors` are learnt beside the student."""

    student: Student
    teacher: Teacher | None
    terms: Terms
    product: torch.dtype = torch.float32
    recompute: bool = False
    seed: int = 0
    pairs: Mapping[int, int] = field(init=False)
    projectors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.pairs, self.projectors = {}, {}
        if self.teacher is None or not self.terms.hidden:
            return
        self.pairs = paired(len(self.student.spec.layers), len(self.teacher.spec.layers))
        width, wide = self.student.spec.hidden_size, self.teacher.spec.hidden_size
        if width != wide:
            generator = torch.Generator().manual_seed(self.seed)
            device = next(iter(self.student.values.values())).device
            for layer in self.pairs:
                first = torch.randn(wide, width, generator=generator) / width**0.5
                self.projectors[f"projector.{layer}"] = first.to(device).requires_grad_()

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms that count."""
        found = {"ce": self.terms.ce}
        if self.teacher is not None:
            found |= {"kl": self.terms.kl, "hidden": self.terms.hidden}
        return {name: weight for name, weight in found.items() if weight}

    def parameters(self) -> dict[str, torch.Tensor]:
        return self.student.parameters() | self.projectors

    def loss(self, sums: Sums, rows: Rows) -> float:
        """The weighted mean that `learn` descends on."""
        return sum(weight * sums[name] / max(1, rows.count(name)) for name, weight in self.weights.items())

    # -- over windows ------------------------------------------------------------------------------------
    def learn(self, windows: Windows, rows: Rows) -> Sums:
        """Add the gradient of these windows' part of the loss, means being taken over `rows`, to the parameters'."""
        reading, head = self._read(windows)
        taught = self._taught(windows)
        last = reading.last.detach().requires_grad_()
        leaf = head.detach().requires_grad_(head.requires_grad)
        factors = {name: weight / max(1, rows.count(name)) for name, weight in self.weights.items()}
        sums = dict.fromkeys(self.weights, 0.0)
        for found in self._by_logits(last, leaf, windows, taught, self.weights):
            torch.stack([factors[name] * value for name, value in found.items()]).sum().backward()  # type: ignore[no-untyped-call]
            _add(sums, found)
        roots: list[torch.Tensor] = [reading.last]
        gradients: list[torch.Tensor | None] = [torch.zeros_like(last) if last.grad is None else last.grad]
        if leaf.grad is not None:
            roots.append(head)
            gradients.append(leaf.grad)
        if self.pairs:
            distance = self._distance(reading, taught, windows)
            _add(sums, {"hidden": distance})
            roots.append(distance * factors["hidden"])
            gradients.append(None)
        torch.autograd.backward(roots, gradients)
        return sums

    @torch.no_grad()
    def measure(self, windows: Windows) -> Sums:
        """Sums of the terms, and always of `ce`."""
        reading, head = self._read(windows)
        taught = self._taught(windows)
        sums = dict.fromkeys(["ce", *self.weights], 0.0)
        for found in self._by_logits(reading.last, head, windows, taught, sums):
            _add(sums, found)
        if self.pairs:
            _add(sums, {"hidden": self._distance(reading, taught, windows)})
        return sums

    def _read(self, windows: Windows) -> tuple[network.Reading, torch.Tensor]:
        states = frozenset(self.pairs)
        return self.student.run(windows.tokens, states=states, product=self.product, recompute=self.recompute)

    def _taught(self, windows: Windows) -> network.Reading | None:
        return None if self.teacher is None else self.teacher.run(windows.tokens, frozenset(self.pairs.values()))

    def _by_logits(
        self,
        last: torch.Tensor,
        head: torch.Tensor,
        windows: Windows,
        taught: network.Reading | None,
        wanted: Collection[str],
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The terms that logits give, summed over a few rows after another. last: normalised states of all rows."""
        if not {"ce", "kl"} & set(wanted):
            return
        length = windows.tokens.shape[1]
        predicts = torch.arange(windows.tokens.numel(), device=last.device).view(-1, length)[:, :-1].flatten()
        targets = windows.tokens[:, 1:].flatten().long()
        true = (~windows.own).repeat_interleave(length - 1)
        step = max(1, LOGITS_AT_ONCE // self.student.spec.vocab_size)
        for start in range(0, len(predicts), step):
            part = slice(start, start + step)
            logits = network.logits(self.student.spec, last[predicts[part]], head, product=self.product)
            found = {}
            if "ce" in wanted:
                found["ce"] = losses.cross_entropy(logits[true[part]], targets[part][true[part]]).sum()
            if "kl" in wanted and self.teacher is not None and taught is not None:
                found["kl"] = self._divergence(logits, self.teacher.logits(taught.last[predicts[part]])).sum()
            yield found

    def _divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.terms.top is None:
            return losses.divergence(student, teacher, self.terms.temperature)
        return losses.divergence_of_top(student, teacher, self.terms.top, self.terms.temperature)

    def _distance(self, reading: network.Reading, taught: network.Reading | None, windows: Windows) -> torch.Tensor:
        """Sum over rows of the mean over layers of the hidden states' distances."""
        assert taught is not None, "hidden states are compared with a teacher's"
        length, found = windows.tokens.shape[1], []
        for layer, above in self.pairs.items():
            own, other = (
                state.view(-1, length, state.shape[1])[:, :-1].flatten(0, 1)
                for state in (reading.states[layer], taught.states[above])
            )
            found.append(losses.distance(own, other, self.projectors.get(f"projector.{layer}")).sum())
        return torch.stack(found).mean()


def paired(layers: int, of: int) -> dict[int, int]:
    """Layers of a student and of its teacher at the same share of their depths: {student's: teacher's}."""
    count = min(STATES, layers)
    depths = [round((i + 1) * layers / count) for i in range(count)]
    return {depth - 1: max(1, round(depth * of / layers)) - 1 for depth in depths}


def _add(sums: Sums, found: Mapping[str, torch.Tensor]) -> None:
    for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + float(value.detach())
