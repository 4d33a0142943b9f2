"""In which number types the walker multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from miaotui.compress.recipe import Precision
from miaotui.errors import UsageError
from miaotui.hardware.detect import detect

_NATIVE = ("avx512_bf16", "amx_bf16")


def resolved(precision: Precision, device: str = "cpu") -> Precision:
    """`fp32` or `bf16`: bf16 where the processor multiplies it itself, or a GPU does."""
    if precision != "auto":
        return precision
    native = any(flag in detect().isa for flag in _NATIVE)
    return "bf16" if native or device != "cpu" else "fp32"


@contextmanager
def products(precision: Precision) -> Iterator[torch.dtype]:
    """The type for a layer's products, while sums over tokens may round what they multiply to the same type.

    The sums themselves are float32 either way. No gradients are kept.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bf16" else "highest")
    try:
        with torch.no_grad():
            yield torch.bfloat16 if precision == "bf16" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


def device_of(choice: str) -> str:
    """`cuda` where there is one and `choice` is `auto`; else what was chosen.

    Raises UsageError for `cuda` where PyTorch finds none.
    """
    if choice.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no CUDA device here.", "Leave --device out, or give cpu.")
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return choice
