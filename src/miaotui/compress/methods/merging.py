"""Merging models of one architecture, tensor by tensor.

Tensors `[…]` float32 of one shape, one of each model, with their weights in. A *change* is what a model's training
added: its tensor minus that of the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor]
Weights = Sequence[float]

PARALLEL = 1e-6
"""sin² of an angle below which two tensors count as parallel."""


def linear(tensors: Tensors, weights: Weights) -> torch.Tensor:
    """The average, by weights that are divided by their sum (model soups, Wortsman et al. 2022)."""
    total = sum(weights)
    return _weighted(tensors, [weight / total for weight in weights])


def slerp(first: torch.Tensor, second: torch.Tensor, at: float) -> torch.Tensor:
    """From `first` (0) to `second` (1) along the great circle between their directions (Shoemake 1985, section 3.3).

    The weights of the arc are put on the tensors as they are, so that their lengths are interpolated too. Where they
    are parallel, opposite or zero there is no one arc, and a straight line is taken.
    """
    lengths = first.norm() * second.norm()
    cosine = float((first * second).sum() / lengths) if float(lengths) > 0 else 1.0
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1))
    sine = torch.sin(angle)
    if float(sine) ** 2 < PARALLEL:
        return torch.lerp(first, second, at)
    return first * float(torch.sin((1 - at) * angle) / sine) + second * float(torch.sin(at * angle) / sine)


def task_arithmetic(base: torch.Tensor, tensors: Tensors, weights: Weights) -> torch.Tensor:
    """The base with the weighted sum of all changes (Ilharco et al. 2022, section 2). A weight below 0 unlearns."""
    return base + _weighted([tensor - base for tensor in tensors], weights)


def ties(base: torch.Tensor, tensors: Tensors, weights: Weights, density: float) -> torch.Tensor:
    """Trim, elect a sign, average what agrees with it (Yadav et al. 2023, algorithm 1).

    Trimming keeps each tensor's own share `density` of largest changes, where the paper takes the share of all tensors
    together: so it can stream. An element whose weighted changes cancel out stays the base's.
    """
    changes = [trim(tensor - base, density) for tensor in tensors]
    return base + agreeing_mean(changes, weights)


def trim(change: torch.Tensor, density: float) -> torch.Tensor:
    """The largest share `density` of elements, by size, rounded to the nearest count; zero for the others."""
    count = round(change.numel() * density)
    if count >= change.numel():
        return change
    if count == 0:
        return torch.zeros_like(change)
    kept = change.abs().reshape(-1).topk(count, sorted=False).indices
    trimmed = torch.zeros_like(change).reshape(-1)
    trimmed[kept] = change.reshape(-1)[kept]
    return trimmed.reshape(change.shape)


def agreeing_mean(changes: Tensors, weights: Weights) -> torch.Tensor:
    """The weighted mean of those changes, element by element, that have the sign of the weighted sum of all."""
    elected = torch.sign(_weighted(changes, weights))
    total, share = torch.zeros_like(elected), torch.zeros_like(elected)
    for change, weight in zip(changes, weights, strict=True):
        agrees = (torch.sign(change) == elected) & (elected != 0)
        total += torch.where(agrees, change * weight, 0.0)
        share += agrees * weight
    return torch.where(share > 0, total / share, 0.0)


def dare(
    base: torch.Tensor, tensors: Tensors, weights: Weights, density: float, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Task arithmetic of changes of which most are dropped at random (Yu et al. 2023, equation 1).

    Each model's own generator draws which.
    """
    changes = [
        drop_and_rescale(tensor - base, density, generator)
        for tensor, generator in zip(tensors, generators, strict=True)
    ]
    return base + _weighted(changes, weights)


def drop_and_rescale(change: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Each element kept with probability `density` and divided by it, so that its expected value stays."""
    kept = torch.rand(change.shape, generator=generator) < density
    return torch.where(kept, change / density, 0.0)


def generator_for(seed: int, model: int, name: str) -> torch.Generator:
    """Draws that depend on the seed, the model's number and the tensor's name, and not on what was drawn before."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _weighted(tensors: Tensors, weights: Weights) -> torch.Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total
