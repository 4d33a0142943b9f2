"""What pruning knows of the original's activations: of each layer's inputs, from one walk over the calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from miaotui.compress import statistics
from miaotui.compress.data import CalibrationText, windows
from miaotui.compress.hidden import TOKENS_AT_ONCE
from miaotui.compress.layers import read_layer, read_matrix, run_layer
from miaotui.compress.places import Model
from miaotui.compress.precision import products, resolved
from miaotui.compress.recipe import Calibration, Precision
from miaotui.compress.statistics import Gathering, LayerStatistics
from miaotui.compress.windows import WindowLinear, WindowOps
from miaotui.model.chat import ChatTemplate, find_chat_templates
from miaotui.model.tokenizer import Tokenizer

Tell = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Statistics in a folder, a file for each layer; what they were gathered on, and how it was multiplied."""

    folder: Path
    text: CalibrationText
    precision: Precision

    def layer(self, index: int) -> LayerStatistics:
        return statistics.load(self.folder / f"{index}.safetensors")

    def tokens(self, most: int) -> torch.Tensor:
        """The first windows `[windows, length]`, of about so many tokens in all."""
        length = self.text.tokens.shape[1]
        return torch.from_numpy(self.text.tokens[: max(1, most // length)].copy())


@contextmanager
def calibrated(model: Model, calibration: Calibration, near: Path, tell: Tell) -> Iterator[Calibrated]:
    """Statistics of every layer of the model, in a folder beside `near` that goes when the block ends.

    Memory: one layer, its statistics, and the residual stream of all windows. Raises UsageError for a text that cannot
    be used and for activations that are not finite.
    """
    text = calibration_text(model, calibration)
    precision = resolved(calibration.precision)
    with TemporaryDirectory(dir=near.parent, prefix=f".{near.name}.statistics.") as name:
        found = Calibrated(Path(name), text, precision)
        with products(precision) as product:
            _walk(model, torch.from_numpy(text.tokens), product, found.folder, tell)
        yield found


def calibration_text(model: Model, calibration: Calibration) -> CalibrationText:
    """The windows that the model is calibrated on."""
    tokenizer = Tokenizer.from_checkpoint(model.checkpoint)
    talks = bool(find_chat_templates(model.checkpoint))
    template = ChatTemplate.from_checkpoint(model.checkpoint, tokenizer) if talks else None
    return windows(tokenizer, calibration, chat_template=template)


def _walk(model: Model, tokens: torch.Tensor, product: torch.dtype, folder: Path, tell: Tell) -> None:
    """Put all windows through one layer after the other."""
    spec, step = model.spec, max(1, TOKENS_AT_ONCE // tokens.shape[1])
    table = WindowLinear((read_matrix(model, "embedding"),), key="embedding")
    streams = [
        WindowOps(part.shape[1], tokens=part).embed(table, scale=spec.embedding_scale).view(*part.shape, -1)
        for part in (tokens[at : at + step] for at in range(0, len(tokens), step))
    ]
    for index in range(len(spec.layers)):
        layer, gathering = read_layer(model, index), Gathering()
        for i, stream in enumerate(streams):
            streams[i] = run_layer(spec, layer, stream, product=product, listen=gathering)
            gathering.moved(stream, streams[i])
        statistics.save(folder / f"{index}.safetensors", gathering.finish(f"layer {index}"))
        tell(index + 1, len(spec.layers))
