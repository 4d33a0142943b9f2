"""Training of one decoder layer's codes, scales and norms, so that its outputs are the original's again.

Block by block, as BRECQ (Li et al. 2021, arXiv 2102.05426) and EfficientQAT (Chen et al. 2024, arXiv 2407.11062,
phase 1): the layer is given what the quantised layers before it make, and learns what the original made there. The
rounding passes gradients straight through (Bengio et al. 2013); weights are learned in units of their scales, near
where a rounder left them, so that a small step moves a code only where it was nearly a tie (AutoRound, Cheng et al.
2023, arXiv 2309.05516, learns within the same bounds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from miaotui.compress.methods.grid import Grid, Quantised, by_group, quantised, round_scale, symmetric_grid
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import GroupedTensor

Run = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""A decoder layer with these weights and norms on x `[windows, tokens, hidden]`, differentiable, same shape back."""

HELD = 8
"""One window of this many judges the training and is not trained on."""


@dataclass(frozen=True)
class QatOptions:
    """steps: of `batch` windows each. rate: of the weights, in units of their scales; scale_rate: of the scales'
    logarithms; norm_rate: of norms, in units of their own mean magnitude. Rates fall linearly to 0. near: how far from
    its code's middle a weight may start, in units of its scale.
    """

    steps: int = 60
    batch: int = 4
    rate: float = 0.01
    scale_rate: float = 0.002
    norm_rate: float = 0.001
    near: float = 0.45

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or min(self.rate, self.scale_rate, self.norm_rate) < 0:
            raise UsageError(
                f"Training cannot use {self.steps} steps of {self.batch} windows at the rates {self.rate}, "
                f"{self.scale_rate} and {self.norm_rate}.",
                "Give at least one step of one window, and rates of at least 0.",
            )
        if not 0 <= self.near < 0.5:
            raise UsageError(f"A weight may start {self.near} of a step away.", "Give less than 0.5, such as 0.45.")


@dataclass(frozen=True, eq=False)
class Start:
    """A weight `[out, in]` float32 as it should have been, and the grid and codes that a rounder found for it."""

    weight: torch.Tensor
    grid: Grid
    codes: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, tensor: GroupedTensor, scheme: QuantScheme) -> Start:
        """From the codes that a method returned (`Quantised.tensor`) for this scheme, whose scale type they have."""
        scale, codes = torch.from_numpy(tensor.scale.copy()), torch.from_numpy(tensor.codes).float()
        if tensor.minimum is None:
            return cls(weight, symmetric_grid(scheme, weight.shape[1], scale), codes)
        minimum = torch.from_numpy(tensor.minimum.copy())
        zero = torch.round(-minimum / scale)
        whole = torch.equal(-(zero * scale), minimum)
        grid = Grid(scheme, weight.shape[1], scale, zero if whole else None, None if whole else minimum)
        return cls(weight, grid, codes)


class _Learned:
    """One weight under training: u in units of its first scales, and what those are multiplied by, as logarithms."""

    def __init__(self, start: Start, near: float) -> None:
        grid = start.grid
        self.grid = grid
        scale = grid.scale[..., None]
        groups = by_group(start.weight, grid.size)
        exact = groups / scale + grid.zero[..., None] if grid.zero is not None else (groups - _floor(grid)) / scale
        codes = by_group(start.codes, grid.size)
        self.u = torch.clamp(exact, codes - near, codes + near).requires_grad_()
        self.ratio = torch.zeros_like(grid.scale).requires_grad_()

    def scale(self) -> torch.Tensor:
        """As the scheme's type holds it; the gradient does not see that rounding."""
        scale = self.grid.scale * self.ratio.exp()
        return scale + (round_scale(scale.detach(), self.grid.scheme.scale_type) - scale.detach())

    def codes(self) -> torch.Tensor:
        """Whole numbers within range; gradients as if they were u, and none beyond the range."""
        inside = self.u.clamp(-0.5, self.grid.top + 0.5)
        whole = torch.round(inside.detach()).clamp_(0, self.grid.top)
        return inside + (whole - inside.detach())

    def values(self) -> torch.Tensor:
        """What the weight now is, `[out, in]`."""
        codes, scale = self.codes(), self.scale()[..., None]
        if self.grid.zero is not None:
            return ((codes - self.grid.zero[..., None]) * scale).flatten(1)
        return (codes * scale + _floor(self.grid)).flatten(1)

    @torch.no_grad()
    def result(self, weight: torch.Tensor) -> Quantised:
        grid = Grid(self.grid.scheme, self.grid.width, self.scale().clone(), self.grid.zero, self.grid.minimum)
        return quantised(grid, self.codes().flatten(1), weight)


def _floor(grid: Grid) -> torch.Tensor:
    assert grid.minimum is not None
    return grid.minimum[..., None]


@dataclass(frozen=True, eq=False)
class Tuned:
    """What came of it: codes and scales of each weight, norms, and the loss on windows that were not trained on."""

    weights: dict[str, Quantised]
    norms: dict[str, torch.Tensor]
    before: float
    after: float


def tune(
    starts: Mapping[str, Start],
    norms: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    run: Run,
    options: QatOptions = QatOptions(),
    *,
    seed: int = 0,
) -> Tuned:
    """Train a layer on `inputs` `[windows, tokens, hidden]` towards `targets`, the same shape.

    `run` is given the weights of `starts` and `norms` by the same keys. Training that does not lower the loss of the
    windows that it did not see is given up: the result is then the start. The same seed gives the same bits.
    """
    learned = {name: _Learned(start, options.near) for name, start in starts.items()}
    own = {name: norm.detach().clone().requires_grad_() for name, norm in norms.items()}
    train, held = split_windows(inputs.shape[0])
    loss = _Loss(learned, own, run)

    def judge() -> float:
        with torch.no_grad():
            parts = [float(loss(inputs[i : i + 1], targets[i : i + 1])) for i in held]
        return sum(parts) / len(parts)

    before = judge()
    optimiser = _optimiser(learned, own, options)
    draws = torch.Generator().manual_seed(seed)
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * (1 - step / options.steps)
        chosen = torch.tensor(train)[torch.randperm(len(train), generator=draws)[: options.batch]]
        optimiser.zero_grad(set_to_none=True)
        loss(inputs[chosen], targets[chosen]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    after = judge()
    if not after < before:
        learned = {name: _Learned(start, options.near) for name, start in starts.items()}
        own, after = dict(norms), before
    made = {name: one.result(starts[name].weight) for name, one in learned.items()}
    return Tuned(made, {name: norm.detach() for name, norm in own.items()}, before, after)


def split_windows(windows: int) -> tuple[list[int], list[int]]:
    """Windows to train on and to judge by; a single one is both."""
    held = list(range(HELD - 1, windows, HELD)) or [windows - 1]
    return [i for i in range(windows) if i not in held] or held, held


@dataclass(frozen=True, eq=False)
class _Loss:
    """Mean over tokens of ‖y − target‖² / ‖target‖²: a token of enormous activations counts as much as any other."""

    learned: Mapping[str, _Learned]
    norms: Mapping[str, torch.Tensor]
    run: Run

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = {name: one.values() for name, one in self.learned.items()} | dict(self.norms)
        wrong = (self.run(values, x).float() - target).square().sum(dim=-1)
        return (wrong / target.square().sum(dim=-1).clamp(min=1e-12)).mean()


def _optimiser(
    learned: Mapping[str, _Learned], norms: Mapping[str, torch.Tensor], options: QatOptions
) -> torch.optim.Optimizer:
    groups = [
        {"params": [one.u for one in learned.values()], "peak": options.rate},
        {"params": [one.ratio for one in learned.values()], "peak": options.scale_rate},
    ]
    groups += [{"params": [n], "peak": options.norm_rate * float(n.detach().abs().mean())} for n in norms.values()]
    return torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.95))
