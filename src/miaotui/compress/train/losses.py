"""The losses of training, as pure functions of logits and hidden states. Each gives one number a row.

Rows are positions that predict: `[rows, vocabulary]` logits against targets `[rows]`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def cross_entropy(student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log q(target), in nats, `[rows]`."""
    return F.cross_entropy(student, targets, reduction="none")


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T²·KL(p‖q) `[rows]`, p and q being softmax(teacher / T) and softmax(student / T).

    Hinton et al. 2015 (arXiv 1503.02531, section 2): T² keeps the size of its gradient beside cross-entropy's.
    """
    log_q = torch.log_softmax(student / temperature, dim=1)
    log_p = torch.log_softmax(teacher / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1) * temperature**2


def divergence_of_top(
    student: torch.Tensor, teacher: torch.Tensor, count: int, temperature: float = 1.0
) -> torch.Tensor:
    """`divergence` between what is left of p and q when all tokens but the teacher's `count` likeliest are one.

    At most the full divergence (the data-processing inequality), and the same where `count` is the vocabulary but one.
    """
    width = teacher.shape[1]
    if count >= width - 1:
        return divergence(student, teacher, temperature)
    chosen = teacher.topk(count, dim=1).indices
    log_p = _with_rest(torch.log_softmax(teacher / temperature, dim=1).gather(1, chosen))
    log_q = _with_rest(torch.log_softmax(student / temperature, dim=1).gather(1, chosen))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1) * temperature**2


def _with_rest(log_chosen: torch.Tensor) -> torch.Tensor:
    """`[rows, count]` as `[rows, count + 1]`: last the logarithm of what is left of 1."""
    total = torch.logsumexp(log_chosen, dim=1, keepdim=True).clamp(max=-1e-6)
    return torch.cat((log_chosen, torch.log(-torch.expm1(total))), dim=1)


def distance(student: torch.Tensor, teacher: torch.Tensor, projector: torch.Tensor | None = None) -> torch.Tensor:
    """|P·s − t|² / |t|² of hidden states s `[rows, width]` and t `[rows, wide]`, `[rows]`.

    projector P `[wide, width]` (None: none, the widths being equal) is learnt beside the student, as in FitNets
    (Romero et al. 2014) and TinyBERT (Jiao et al. 2019, section 3.1). Being relative, it is the same for every layer's
    scale.
    """
    projected = student if projector is None else student @ projector.T
    return (projected - teacher).square().sum(dim=1) / teacher.square().sum(dim=1).clamp(min=1e-12)
