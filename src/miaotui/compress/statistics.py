"""What calibration learns of a layer, gathered while it runs, and its file.

A second moment is symmetric: its file holds the upper triangle, row after row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from miaotui.checkpoint.write import Stored, write_safetensors
from miaotui.compress.types import InputStatistics, Layer
from miaotui.errors import CheckpointError, UsageError

BLOCKS = 4
"""A second moment is added to in so many strips of rows, each from the diagonal on: 5/8 of the work of the whole."""


@dataclass(eq=False)
class LayerStatistics:
    """inputs: by linear (`qkv`, `mlp_out`, `expert_in.3`). keys, values: largest |x| of each channel of the cache.

    similarity: mean cosine of a token's residual stream before and after the layer (1: the layer did nothing).
    stream: mark of the residual stream after it, see `Hidden.mark`.
    """

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    similarity: float = 0.0
    stream: str = ""


class Gathering:
    """Listens to a layer (`WindowOps`'s `listen`) chunk after chunk, and sums up."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}
        self._peaks: dict[str, torch.Tensor] = {}
        self._cosine = 0.0
        self._tokens = 0

    def __call__(self, key: str, x: torch.Tensor) -> None:
        if key == "router":
            return
        kind, _, _ = key.partition(".")
        if kind in ("keys", "values"):
            peak = x.abs().amax(dim=0)
            before = self._peaks.get(kind)
            self._peaks[kind] = peak if before is None else torch.maximum(before, peak)
            return
        if len(x):
            self._sums.setdefault(key, _Sum(x.shape[1], x.device)).add(x)

    def moved(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """What a layer made of a chunk of the stream."""
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self._cosine += float(cosine.double().sum())
        self._tokens += cosine.numel()

    def finish(self, where: str) -> LayerStatistics:
        """The sums, on the CPU. Raises UsageError where activations were not finite; `where` names the layer."""
        inputs = {key: total.finish() for key, total in self._sums.items()}
        for key, found in inputs.items():
            if not bool(torch.isfinite(found.moment).all()):
                raise UsageError(
                    f"The activations of {where} are not finite before {key}.",
                    "Check that the model answers sensibly; calibration.precision fp32 may help.",
                )
        peaks = {kind: peak.cpu() for kind, peak in self._peaks.items()}
        similarity = self._cosine / self._tokens if self._tokens else 0.0
        return LayerStatistics(inputs, peaks.get("keys"), peaks.get("values"), similarity)


class _Sum:
    """One linear's inputs."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.moment = torch.zeros(width, width, device=device)
        self.mean_abs = torch.zeros(width, device=device)
        self.low = torch.full((width,), float("inf"), device=device)
        self.high = torch.full((width,), float("-inf"), device=device)
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        width = x.shape[1]
        step = -(-width // BLOCKS)
        for start in range(0, width, step):
            self.moment[start : start + step, start:].addmm_(x[:, start : start + step].T, x[:, start:])
        self.mean_abs += x.abs().sum(dim=0)
        torch.minimum(self.low, x.amin(dim=0), out=self.low)  # over tenfold as fast as aminmax along rows
        torch.maximum(self.high, x.amax(dim=0), out=self.high)
        self.rows += x.shape[0]

    def finish(self) -> InputStatistics:
        moment = mirrored(self.moment.cpu())
        mean = self.mean_abs.cpu() / self.rows
        return InputStatistics(moment, mean, self.low.cpu(), self.high.cpu(), self.rows)


def mirrored(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix with this upper triangle, in place; what is below does not count."""
    for start in range(0, len(upper), 512):
        end = min(start + 512, len(upper))
        upper[end:, start:end] = upper[start:end, end:].T
        square = upper[start:end, start:end].triu()
        upper[start:end, start:end] = square + square.triu(1).T
    return upper


def attach(layer: Layer, found: LayerStatistics) -> None:
    """Give a layer's linears what calibration knows of them."""
    for key, group in layer.groups.items():
        group.statistics = found.inputs.get(key)
    layer.key_peaks, layer.value_peaks = found.keys, found.values


# -- files ---------------------------------------------------------------------------------------------------------
def save(path: Path, statistics: LayerStatistics) -> None:
    """Whole or not at all."""
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    for key, found in statistics.inputs.items():
        rows = [found.moment[i, i:] for i in range(len(found.moment))]
        arrays[f"{key}/moment"] = torch.cat(rows).numpy()
        for name in ("mean_abs", "low", "high"):
            arrays[f"{key}/{name}"] = getattr(found, name).numpy()
    for name, peak in (("keys", statistics.keys), ("values", statistics.values)):
        if peak is not None:
            arrays[name] = peak.numpy()
    about = {f"{key}/rows": str(found.rows) for key, found in statistics.inputs.items()}
    about |= {"similarity": repr(statistics.similarity), "stream": statistics.stream}
    write_safetensors(path, [Stored(name, "F32", a.shape) for name, a in arrays.items()], arrays.__getitem__, about)


def load(path: Path) -> LayerStatistics:
    """What `save` wrote. Raises CheckpointError for a file that is no such thing."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            keys = [name.removesuffix("/rows") for name in about if name.endswith("/rows")]
            inputs = {key: _inputs(file.get_tensor, key, int(about[f"{key}/rows"])) for key in keys}
            peaks = {name: file.get_tensor(name) for name in ("keys", "values") if name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read.", "Remove it: it is made again.") from error
    return LayerStatistics(
        inputs, peaks.get("keys"), peaks.get("values"), float(about["similarity"]), about.get("stream", "")
    )


def _inputs(get: Callable[[str], torch.Tensor], key: str, rows: int) -> InputStatistics:
    packed, mean, low, high = (get(f"{key}/{name}") for name in ("moment", "mean_abs", "low", "high"))
    width = len(mean)
    moment = torch.empty(width, width)
    start = 0
    for i in range(width):
        moment[i, i:] = packed[start : start + width - i]
        start += width - i
    return InputStatistics(mirrored(moment), mean, low, high, rows)
