"""A weight refitted to the inputs that it will have, so that its outputs are those that the original had with its own.

Rounding after rounding moves the inputs X̃ of a linear away from the original's X. GPTQ asks for ‖(W − Q)·X̃‖; what is
wanted is ‖W·X + E − Q·X̃‖, E being what the residual stream lacks by then. That is ‖(W′ − Q)·X̃‖ and a constant, with
W′ the least-squares fit of W·X + E on X̃: rounding then goes on as ever with W′. The asymmetric calibration of GPTAQ
(Li et al. 2025, arXiv 2504.02692) in closed form; the same first step as in Qronos (Zhang et al. 2025, arXiv
2505.11695).
"""

from __future__ import annotations

import torch


def corrected(
    weight: torch.Tensor,
    moment: torch.Tensor,
    cross: torch.Tensor,
    damping: float,
    *,
    lack: torch.Tensor | None = None,
) -> torch.Tensor:
    """W′ `[out, in]` = W + (W·(XX̃ᵀ − X̃X̃ᵀ) + E·X̃ᵀ)·(X̃X̃ᵀ + λ)⁻¹: what is not known well stays as it was.

    With inputs in rows: moment X̃ᵀX̃ and cross XᵀX̃ `[in, in]`; lack EᵀX̃ `[out, in]`. λ is `damping` times the mean of
    the moment's diagonal. Inputs that never occur keep their weights.
    """
    wanted = weight @ (cross - moment)
    if lack is not None:
        wanted = wanted + lack
    mean = float(moment.diagonal().mean())
    if mean <= 0:
        return weight
    lower, failed = torch.linalg.cholesky_ex(moment + damping * mean * torch.eye(len(moment)))
    if int(failed):
        return weight
    change = torch.cholesky_solve(wanted.T, lower).T
    return weight + change if bool(torch.isfinite(change).all()) else weight
