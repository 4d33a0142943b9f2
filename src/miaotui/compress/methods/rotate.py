"""Rotations folded into the weights, so that outliers spread over all channels and the answer stays the same.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), section 4, stage 1; the positions are SpinQuant's R1 (the residual
stream) and R2 (each value head). Weights are `[out, in]`, rotations orthogonal `[n, n]`, acting on row vectors: the
stream h becomes h·R.

R1: norm weights are absorbed into what reads the stream (an RMS norm without weight commutes with a rotation), what
reads it becomes W·R, what writes to it Rᵀ·W. R2: the values of a head become v·R, the output projection undoes it.
A tied head would have to absorb the last norm's weight and cannot stay tied under R1: it is written apart, and the
file grows by it. R2 leaves it alone.
"""

from __future__ import annotations

import math

import torch


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    """An orthogonal matrix `[size, size]` whose entries are all of one magnitude, or nearly.

    The Kronecker product of a Sylvester Hadamard matrix for the power of two in `size` and an orthonormal discrete
    cosine transform for the odd rest (576 = 64 · 9), its rows' signs drawn by `seed`.
    """
    power = size & -size
    made = torch.kron(_cosines(size // power), _sylvester(power))
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (made * signs[:, None]).float()


def _sylvester(size: int) -> torch.Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / math.sqrt(size)


def _cosines(size: int) -> torch.Tensor:
    """The orthonormal DCT-II."""
    at = torch.arange(size, dtype=torch.float64)
    made = torch.cos(math.pi / size * (at + 0.5) * at[:, None]) * math.sqrt(2 / size)
    made[0] = math.sqrt(1 / size)
    return made


# -- R1: the residual stream -----------------------------------------------------------------------------------------
def absorb_norm(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """A linear that reads a normalised stream, with the norm's weight (offset included) in it: `W · diag(γ)`."""
    return weight * norm


def rotate_reader(weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """A linear that reads the stream, after `absorb_norm`; and the embedding's rows, which are the stream: `W · R`."""
    return weight @ r


def rotate_writer(weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """A linear that adds to the stream, or its bias: `Rᵀ · W`."""
    return r.T @ weight


def rotate_moment(moment: torch.Tensor, r: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
    """XᵀX of inputs after they were divided by the norm's weight and rotated: Rᵀ·diag(1/γ)·XᵀX·diag(1/γ)·R.

    Channels whose γ is (nearly) 0 carried nothing in x; they are taken as 0.
    """
    if norm is not None:
        inverse = torch.where(norm.abs() > 1e-6, 1 / norm, 0.0)
        moment = moment * (inverse[:, None] * inverse)
    return r.T @ moment @ r


# -- R2: value heads ----------------------------------------------------------------------------------------------
def rotate_values(weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The value projection `[kv_heads · head_dim, in]`, or its bias: every head's rows become Rᵀ · rows."""
    heads = weight.reshape(-1, r.shape[0], *weight.shape[1:])
    return torch.einsum("de,hd...->he...", r, heads).reshape(weight.shape)


def rotate_output(weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The output projection `[out, heads · head_dim]`: every head's columns become columns · R."""
    return (weight.reshape(weight.shape[0], -1, r.shape[0]) @ r).reshape(weight.shape)


def rotate_output_moment(moment: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """XᵀX `[heads · head_dim]²` of the output projection's inputs once every head is rotated."""
    return rotate_output(rotate_output(moment, r).T, r).T
