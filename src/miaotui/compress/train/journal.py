"""What a training tells: TensorBoard's event files, and a line for people now and then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from miaotui.errors import DependencyError

Tell = Callable[[str], None]


class Journal:
    """Numbers by step in `folder`, and lines to `tell`. A process that is not the first has neither."""

    def __init__(self, folder: Path, tell: Tell, *, first: bool, step: int) -> None:
        """step: the first that will be told; what the files say of it and later ones counts no more."""
        self._tell = tell if first else _nobody
        self._writer: Any = None
        if first:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise DependencyError(
                    "TensorBoard's files are written with tensorboardX, which is absent.",
                    "Install it: pip install 'miaotui[compress]'.",
                ) from error
            self._writer = SummaryWriter(str(folder), purge_step=step, flush_secs=5)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by tag (`train/loss`); one that is not finite is left out."""
        if self._writer is not None:
            for tag, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(tag, value, step)

    def say(self, line: str) -> None:
        self._tell(line)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _nobody(line: str) -> None:
    return None
