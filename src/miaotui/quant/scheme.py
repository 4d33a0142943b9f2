"""How a matrix of weights is coded: the one vocabulary that readers, kernels and compressors share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScaleType = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class QuantScheme:
    """Affine coding of a weight `[out, in]` in groups along `in`.

    A code `q` is an unsigned integer of `bits` bits. With its group's `scale` (and `minimum`):

    - symmetric:   value = scale · (q − 2^(bits−1))
    - asymmetric:  value = scale · q + minimum

    `group_size` is the number of neighbours along `in` that share a scale; None means the whole row
    ("per channel"). The last group of a row may be short.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_type: ScaleType = "float16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive or None, not {self.group_size}")

    @property
    def zero(self) -> int:
        """The code that stands for 0 in a symmetric scheme."""
        return 1 << (self.bits - 1) if self.symmetric else 0

    def groups(self, width: int) -> int:
        """How many groups a row of `width` elements has."""
        return 1 if self.group_size is None else -(-width // self.group_size)

    def __str__(self) -> str:
        """The name used on the command line and on cards, such as `w4g64-sym`."""
        group = "-channel" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}{group}-{'sym' if self.symmetric else 'asym'}"
