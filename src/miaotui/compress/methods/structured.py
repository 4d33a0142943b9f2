"""What of a dense model can go whole (blocks, heads, channels, hidden dimensions), and how the rest makes up for it.

Importance is the energy of what a part adds to its layer's outputs, measured on XᵀX of the layer's inputs: what would
be missing if it went. Minitron (Muralidharan et al. 2024, arXiv 2407.14679) ranks by the size of activations alone;
ShortGPT (Men et al. 2024, arXiv 2403.03853) ranks blocks by how little they turn the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from miaotui.errors import UsageError

DAMPING = 0.01
"""Share of the mean of the moment's diagonal that ties corrected weights to the original ones."""


# -- importance ----------------------------------------------------------------------------------------------
def channel_importance(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Energy `[in]` that each input adds to the outputs of a weight `[out, in]`: ‖X_j‖² · ‖W_j‖²."""
    return moment.diagonal() * weight.square().sum(dim=0)


def group_importance(weight: torch.Tensor, moment: torch.Tensor, groups: int) -> torch.Tensor:
    """Energy `[groups]` that each run of neighbouring inputs adds to the outputs: ‖X_g · W_gᵀ‖².

    With the output projection of attention, and one group for each head of keys, those of its queries.
    """
    width = weight.shape[1] // groups
    parts = [slice(g * width, (g + 1) * width) for g in range(groups)]
    return torch.stack([((weight[:, p] @ moment[p, p]) * weight[:, p]).sum() for p in parts])


def shares(importance: torch.Tensor) -> torch.Tensor:
    """Importance as shares of its sum, so that layers can be added up."""
    total = importance.sum()
    return importance / total if float(total) > 0 else torch.full_like(importance, 1 / len(importance))


def most_important(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest, in their own order."""
    return importance.topk(count).indices.sort().values


def drop_greedily(
    count: int, costs: Callable[[frozenset[int]], Mapping[int, float]]
) -> tuple[list[int], list[dict[int, float]]]:
    """Blocks to drop, one after the other, each the one whose going costs the least now (SLEB, Song et al. 2024).

    `costs` is told which blocks are gone, and says of each other what it costs that it goes too. Returns the blocks in
    that order, and each round's costs.
    """
    gone: list[int] = []
    rounds: list[dict[int, float]] = []
    for _ in range(count):
        rounds.append(dict(costs(frozenset(gone))))
        gone.append(min(rounds[-1], key=lambda block: (rounds[-1][block], block)))
    return gone, rounds


# -- what the rest does about it -------------------------------------------------------------------------------
def keep_columns(
    weight: torch.Tensor, kept: torch.Tensor, moment: torch.Tensor | None = None, damping: float = DAMPING
) -> torch.Tensor:
    """A weight `[out, in]` for the inputs that are `kept` alone.

    With a moment, moved to where its outputs come nearest to what they were with all inputs: least squares, tied to
    the weights as they are (W_S + W_R·M_RS·(M_SS + λ)⁻¹, with S kept and R gone). So in SlimGPT (Ling et al. 2024).
    """
    if moment is None:
        return weight[:, kept].contiguous()
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    within = moment[kept][:, kept].clone()
    within.diagonal().add_(damping * float(moment.diagonal().mean()) + torch.finfo(torch.float32).tiny)
    lower, failed = torch.linalg.cholesky_ex(within)
    if int(failed):
        raise UsageError(
            "The calibration gave activations that cannot be solved for.", "Calibrate on more text, or do not correct."
        )
    missing = weight[:, gone] @ moment[gone][:, kept]
    return weight[:, kept] + torch.cholesky_solve(missing.T, lower).T


def narrower_norm(weight: torch.Tensor, kept: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """An RMS norm's weight for the `kept` hidden dimensions alone.

    energy `[hidden]`: mean square of each dimension of the norm's output before its weight, 1 on average. The kept ones
    have another root mean square than all had; the weight takes that on, so that on average the output is the same.
    """
    return weight[kept] * energy[kept].mean().clamp(min=torch.finfo(torch.float32).tiny).sqrt()


# -- rows of what is cut ---------------------------------------------------------------------------------------
def spread(kept: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the rows that groups of `width` rows each have: head h is rows h·width to (h + 1)·width."""
    return (kept[:, None] * width + torch.arange(width)).flatten()


def take_rows(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    rows: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Rows of each matrix, with their biases; where a family has all parts in one matrix, of each part of it.

    rows: of each part, counted from the part's first row; sizes: how many rows each part has.
    """
    chosen = list(rows)
    if len(weights) != len(rows):
        assert len(weights) == 1, "a role is one matrix, or one for each part"
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        chosen = [torch.cat([part + start for part, start in zip(rows, starts, strict=True)])]
    cut = [weight[index].contiguous() for weight, index in zip(weights, chosen, strict=True)]
    if biases is None:
        return cut, None
    return cut, [bias[index].contiguous() for bias, index in zip(biases, chosen, strict=True)]
