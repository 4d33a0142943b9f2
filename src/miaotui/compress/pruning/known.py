"""What pruning knows of the original's activations: the statistics that every method of compression shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from miaotui.checkpoint.demo import cache_folder
from miaotui.compress.calibrate import Statistics, calibrate
from miaotui.compress.places import Model
from miaotui.compress.precision import resolved
from miaotui.compress.recipe import Calibration, Precision
from miaotui.compress.text.data import CalibrationText, windows
from miaotui.model.chat import ChatTemplate, find_chat_templates
from miaotui.model.tokenizer import Tokenizer

Tell = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Statistics, the text that they are of, and how it was multiplied."""

    statistics: Statistics
    text: CalibrationText
    precision: Precision

    def tokens(self, most: int) -> torch.Tensor:
        """The first windows `[windows, length]`, of about so many tokens in all."""
        length = self.text.tokens.shape[1]
        return torch.from_numpy(self.text.tokens[: max(1, most // length)].copy())


def calibrated(model: Model, calibration: Calibration, cache: Path | None, tell: Tell) -> Calibrated:
    """Statistics of every layer of a model, from the cache where they are.

    Raises UsageError for a text that cannot be used and for activations that are not finite.
    """
    tokenizer = Tokenizer.from_checkpoint(model.checkpoint)
    talks = bool(find_chat_templates(model.checkpoint))
    template = ChatTemplate.from_checkpoint(model.checkpoint, tokenizer) if talks else None
    text = windows(tokenizer, calibration, chat_template=template)
    precision = resolved(calibration.precision)
    where = cache or cache_folder() / "calibration"
    found = calibrate(model, text, where, precision=precision, tell=lambda at: tell(at.done, at.total))
    return Calibrated(found, text, precision)
