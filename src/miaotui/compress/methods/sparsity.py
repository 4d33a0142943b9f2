"""Which weights go: a share of all, or all but N of every M neighbours along a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from miaotui.errors import UsageError

MOST = 64
"""Neighbours that a pattern may take together."""


@dataclass(frozen=True)
class Sparsity:
    """A share of weights that become 0; or, with `of`, `keep` of every `of` neighbouring inputs stay (2:4, 4:8)."""

    share: float
    keep: int | None = None
    of: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"The sparsity is {self.share:g}.", "Give a share between 0 and 1, such as 50%.")

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """`50%`, `0.5` or `2:4`. Raises UsageError for anything else."""
        pattern = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if pattern:
            keep, of = int(pattern[1]), int(pattern[2])
            if not 0 < keep < of <= MOST:
                raise UsageError(f"The pattern {text} keeps {keep} of {of}.", f"Keep some of at most {MOST}: 2:4, 4:8.")
            return cls(1 - keep / of, keep, of)
        return cls(parse_share(text, "The sparsity"))

    def __str__(self) -> str:
        return f"{self.share:.4g}" if self.of is None else f"{self.keep}:{self.of}"

    def check(self, width: int) -> None:
        """Raises UsageError where rows of this width are not made of whole groups."""
        if self.of is not None and width % self.of:
            raise UsageError(
                f"Rows of {width} weights are not made of groups of {self.of}.", "Choose another pattern, or a share."
            )

    def lowest(self, scores: torch.Tensor, *, by_row: bool) -> torch.Tensor:
        """True `[out, in]` where a weight goes: the lowest scores of each group, of each row, or of the matrix.

        As many as `share` says, rounded down; of equal scores any.
        """
        self.check(scores.shape[1])
        if self.of is not None and self.keep is not None:
            grouped = scores.reshape(-1, self.of)
            return _lowest(grouped, self.of - self.keep).reshape(scores.shape)
        rows = scores if by_row else scores.reshape(1, -1)
        return _lowest(rows, int(rows.shape[1] * self.share)).reshape(scores.shape)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` lowest of each row."""
    gone = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        gone.scatter_(1, scores.topk(count, dim=1, largest=False, sorted=False).indices, True)
    return gone


def parse_share(text: str, what: str) -> float:
    """`50%` or `0.5`. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", text.strip())
    if match is None:
        raise UsageError(f"{what} is {text!r:.40}.", "Give a share, such as 50% or 0.5.")
    return float(match[1]) / (100 if match[2] else 1)
