"""Scales and norms of all layers trained together, so that the compressed model predicts what the original predicts.

The loss is the divergence of its predictions from the original's, on the calibration text (EfficientQAT, Chen et al.
2024, arXiv 2407.11062, section 3.3, whose loss is the text's own). Layers are read one at a time, forward and again
backward, so that memory holds one layer with its gradient, and between layers the streams of one step's windows. What
the original's head is given is kept in a file: logits are made from it when they are compared.

After each step everything is on disk: a run that was killed goes on with the next step, and gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import torch

from miaotui.checkpoint.write import atomic_file
from miaotui.compress import hidden as streams
from miaotui.compress.calibrate import FinalNorm, embed
from miaotui.compress.hidden import TOKENS_AT_ONCE, Hidden
from miaotui.compress.inputs import Change, input_changes
from miaotui.compress.layers import read_layer, run_layer
from miaotui.compress.methods.qat import split_windows
from miaotui.compress.methods.scales import ratio_gradient
from miaotui.compress.places import Model
from miaotui.compress.precision import products
from miaotui.compress.progress import Clock, Progress, Tell, silent
from miaotui.compress.solved import Solved
from miaotui.compress.text.data import CalibrationText
from miaotui.compress.train import losses, network
from miaotui.compress.train.objective import LOGITS_AT_ONCE
from miaotui.compress.train.state import Snapshot, Store, optimiser_tensors, restore_optimiser
from miaotui.compress.trained import SolvedModel, Trained, trainable
from miaotui.compress.types import KEPT, Layer, Place
from miaotui.compress.work import Work

BETAS = (0.9, 0.95)


def train(work: Work, solved: Solved, tell: Tell = silent) -> tuple[Solved, dict[str, float]]:
    """The solution that training ends with, and the mean divergence (nats a token) on windows that were not trained
    on, `before` and `after`; where that did not fall, the solution as it was.
    """
    with products(work.precision) as product:
        training = _Training(work, solved, product)
        training.run(tell)
    judged = training.judged
    tell(Progress("train", 0, 0, note=f"KL to the original {judged['before']:.4f} → {judged['after']:.4f}"))
    return (training.student if judged["after"] < judged["before"] else solved), judged


class _Training:
    """One training, taken up where it was left."""

    def __init__(self, work: Work, solved: Solved, product: torch.dtype) -> None:
        assert work.text is not None, "nothing to train on"
        assert work.steps.scales is not None
        self.work, self.product, self.options = work, product, work.steps.scales
        self.spec = work.model.spec
        self.ratios = {place: torch.zeros(shape).requires_grad_() for place, shape in trainable(solved)}
        self.student = Trained(
            solved.source, solved.spec, solved.names, solved.kv_scheme, solved.folder, solved.parts, self.ratios,
            work.steps.minimum == "free",
        )  # fmt: skip
        self.model = SolvedModel.of(self.student)
        self.optimiser = self._optimiser()
        self.trained, self.held = split_windows(len(work.text.tokens))
        self.judged: dict[str, float] = {}
        self.step = 0
        self.store = Store(work.folder / f"training-{work.belongs_to}", {"belongs_to": work.belongs_to})

    def prepare(self, tell: Tell) -> None:
        """What every step reads."""
        self.begin, self.taught = self._stream("begin", 0), _original(self.work, self.product, tell)
        embed(self.model, _text(self.work), self.begin)
        self.heads = [_matrix(self.work.model, network.head_of(self.spec), self.product)]
        self.heads.append(_matrix(self.model, self.model.head, self.product))

    def run(self, tell: Tell) -> None:
        """All steps, and the judgement before and after them."""
        self.prepare(tell)
        self._restore()
        batches = list(self._batches())
        clock = Clock(tell, "train", len(batches))
        if "before" not in self.judged:
            self.judged["before"] = self._judge()
            self._save()
        clock.kept(self.step)
        for number in range(self.step, len(batches)):
            self.descend(batches[number], 1 - number / len(batches))
            self.step = number + 1
            self._save()
            clock.step()
        if "after" not in self.judged:
            self.judged["after"] = self._judge()
            self._save()

    def _stream(self, name: str, index: int) -> Hidden:
        windows, length = _text(self.work).tokens.shape
        return streams.at(self.work.folder, name, index, (windows, length, self.spec.hidden_size))

    def _batches(self) -> Iterator[torch.Tensor]:
        """Windows of each step: all that are trained on, in another order each time."""
        draws = torch.Generator().manual_seed(self.work.recipe.calibration.seed)
        for _ in range(self.options.epochs):
            order = torch.randperm(len(self.trained), generator=draws)
            yield from torch.split(torch.tensor(self.trained)[order], self.options.batch)

    def _optimiser(self) -> torch.optim.Optimizer:
        linears = [ratio for ratio in self.ratios.values() if ratio.dim() > 1]
        norms = [ratio for ratio in self.ratios.values() if ratio.dim() == 1]
        groups = [
            {"params": linears, "peak": self.options.rate},
            {"params": norms, "peak": self.options.norm_rate},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=1.0, betas=BETAS)

    # -- a step ------------------------------------------------------------------------------------------
    def descend(self, chosen: torch.Tensor, share: float) -> None:
        """One step on these windows, with `share` of the rates."""
        self.optimiser.zero_grad(set_to_none=True)
        before: list[torch.Tensor] = []
        last = self._forward(chosen, before)
        gradient = self._learn_ends(last, chosen)
        for index in reversed(range(len(self.spec.layers))):
            gradient = self._backward(index, before.pop(), gradient)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * share
        self.optimiser.step()

    def _forward(self, chosen: torch.Tensor, before: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The stream `[windows, length, hidden]` after all layers; `before` is given that before each."""
        hidden = self.begin.all()[chosen]
        for index in range(len(self.spec.layers)):
            if before is not None:
                before.append(hidden)
            layer, inputs = self._layer(index)
            parts = [run_layer(self.spec, layer, x, product=self.product, inputs=inputs) for x in _parts(hidden)]
            hidden = torch.cat(parts)
        return hidden

    def _backward(self, index: int, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of what goes into a layer from that of what comes out; what the layer learns is added up."""
        layer, inputs = self._layer(index)
        leaves = {place: value.requires_grad_() for place, value in _weights(layer) if place in self.ratios}
        found = []
        for x, part in zip(_parts(hidden), _parts(gradient), strict=True):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                run_layer(self.spec, layer, leaf, product=self.product, inputs=inputs).backward(part)  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            found.append(leaf.grad)
        for place, value in leaves.items():
            self._learn(place, value)
        return torch.cat(found)

    def _learn_ends(self, last: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The gradient of the stream after the last layer; the last norm learns."""
        norm = FinalNorm(self.model)
        weight = norm.weight.weight.requires_grad_()
        with torch.enable_grad():
            leaf = last.detach().requires_grad_()
            normal = norm(leaf)
            ended = normal.detach().requires_grad_()
            for loss in self._divergences(ended, self.taught.all()[chosen]):
                (loss / (ended.shape[0] * ended.shape[1])).backward()  # type: ignore[no-untyped-call]
            normal.backward(ended.grad)  # type: ignore[no-untyped-call]
        self._learn(Place("norm"), weight)
        assert leaf.grad is not None
        return leaf.grad

    def _learn(self, place: Place, value: torch.Tensor) -> None:
        if value.grad is None:  # an expert that no token came to
            return
        if value.dim() == 1:
            self.ratios[place].grad = value.grad * value.detach()
            return
        before = self.student.before(place)
        self.ratios[place].grad = ratio_gradient(value.detach(), value.grad, before, free=self.student.free)

    # -- pieces ------------------------------------------------------------------------------------------
    def _layer(self, index: int) -> tuple[Layer, dict[str, Change]]:
        """A layer as it is now, and what becomes of its linears' inputs."""
        schemes = self.student.schemes
        layer = read_layer(self.model, index, lambda place: schemes.get(place, KEPT))
        return layer, input_changes(layer, dict(self.student.input_scales))

    def _divergences(self, last: torch.Tensor, taught: torch.Tensor) -> Iterator[torch.Tensor]:
        """Summed over a few tokens after another. Both `[windows, length, hidden]`, as the heads are given them."""
        rows = max(1, LOGITS_AT_ONCE // self.spec.vocab_size)
        for own, other in zip(*(torch.split(x.flatten(0, 1), rows) for x in (last, taught)), strict=True):
            with torch.no_grad():
                target = network.logits(self.spec, other, self.heads[0], product=self.product)
            yield losses.divergence(network.logits(self.spec, own, self.heads[1], product=self.product), target).sum()

    def _judge(self) -> float:
        """Mean divergence on the windows that are not trained on."""
        total, norm = 0.0, FinalNorm(self.model)
        for window in torch.split(torch.tensor(self.held), 1):
            last = norm(self._forward(window))
            total += sum(float(loss) for loss in self._divergences(last, self.taught.all()[window]))
        return total / (len(self.held) * self.begin.shape[1])

    # -- on disk -----------------------------------------------------------------------------------------
    def _save(self) -> None:
        names = {ratio: str(number) for number, ratio in enumerate(self.ratios.values())}
        tensors = {f"ratios/{name}": ratio for ratio, name in names.items()}
        tensors |= {f"optimiser/{name}": value for name, value in optimiser_tensors(self.optimiser, names).items()}
        self.store.save(Snapshot(tensors, {"step": self.step, "judged": self.judged}))

    def _restore(self) -> None:
        snapshot = self.store.load()
        if snapshot is None:
            return
        named = {str(number): ratio for number, ratio in enumerate(self.ratios.values())}
        for name, ratio in named.items():
            ratio.copy_(snapshot.tensors[f"ratios/{name}"])
        moments = {n.removeprefix("optimiser/"): v for n, v in snapshot.tensors.items() if n.startswith("optimiser/")}
        restore_optimiser(self.optimiser, named, moments)
        self.step, self.judged = snapshot.values["step"], snapshot.values["judged"]


# -- the original ------------------------------------------------------------------------------------------------
def _original(work: Work, product: torch.dtype, tell: Tell) -> Hidden:
    """What the original's head is given, `[windows, length, hidden]`, in a file; written after each layer."""
    windows, length = _text(work).tokens.shape
    layers, about = len(work.model.spec.layers), work.folder / "taught.json"

    def stream(index: int) -> Hidden:
        return streams.at(work.folder, "taught", index, (windows, length, work.model.spec.hidden_size))

    def said(index: int) -> dict[str, object]:
        return {"belongs_to": work.belongs_to, "index": index, "mark": stream(index).mark()}

    found = json.loads(about.read_text()) if about.exists() else {}
    start = int(found.get("index", 0))
    if not found or found != said(start):
        start = 0
        embed(work.model, _text(work), stream(0))
    clock = Clock(tell, "teach", layers + 1)
    clock.kept(start)
    for index in range(start, layers + 1):
        stream(index).map(stream(index + 1), _step(work.model, index, product))
        with atomic_file(about) as file:
            file.write(json.dumps(said(index + 1)).encode())
        streams.drop_others(work.folder, "taught", frozenset({index + 1}))
        clock.step()
    return stream(layers + 1)


def _step(model: Model, index: int, product: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer of the original, or after the last one its norm."""
    if index == len(model.spec.layers):
        return FinalNorm(model)
    layer = read_layer(model, index)
    return lambda x: run_layer(model.spec, layer, x, product=product)


def _text(work: Work) -> CalibrationText:
    assert work.text is not None
    return work.text


def _matrix(model: Model, place: Place, product: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(model.values(place).dense32())).to(product)


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As many windows at a time as go through a layer together."""
    return torch.split(x, max(1, TOKENS_AT_ONCE // x.shape[1]))


def _weights(layer: Layer) -> Iterator[tuple[Place, torch.Tensor]]:
    """Matrices of linears and weights of norms."""
    for group in layer.groups.values():
        yield from zip(group.places, group.weights, strict=True)
    for role, norm in layer.norms.items():
        yield Place(role, layer.index), norm
