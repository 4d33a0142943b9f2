"""Running out of GPU memory, said in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from miaotui.errors import ResourceError


@contextmanager
def memory_needed(device: torch.device, what: str) -> Iterator[None]:
    """Say in numbers what did not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = (value / 2**30 for value in torch.cuda.mem_get_info(device))
        message = f"The GPU has {free:.1f} of {total:.1f} GiB free, too little for {what}."
        raise ResourceError(message, "Lower --max-model-len or --max-num-seqs, or use --device cpu.") from error
