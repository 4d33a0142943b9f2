"""What a quantised layout is, and the checks that all layouts share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from miaotui.errors import UnsupportedModelError
from miaotui.quant.scheme import ScaleType
from miaotui.quant.tensor import DenseTensor, Tensor

Pieces = Mapping[str, tuple[str, NDArray[Any]]]
"""A weight's stored parts: suffix to (safetensors type, array)."""

Scale = tuple[NDArray[np.float32], ScaleType]


class Mismatch(Exception):
    """The parts of a weight do not fit together. The reader turns it into a CheckpointError."""


class Stored(Protocol):
    """What `find` needs to know of a stored tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Layout(Protocol):
    """How one quantisation method stores its weights."""

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        """Weight name (`X.weight`) to its parts, suffix to stored name."""
        ...

    def join(self, name: str, pieces: Pieces) -> Tensor:
        """The weight `name` (`X.weight`) that the parts are. Raises Mismatch when they do not fit together."""
        ...


def refuse(key: str, value: Any) -> NoReturn:
    raise UnsupportedModelError(
        f"The model's quantization_config has {key} = {str(value)[:80]!r}, which is not supported.",
        "Supported are compressed-tensors (pack-, int- and float-quantized, sparse-bitmask), GPTQ and AWQ (gemm).",
    )


def known_keys(where: str, given: Any, known: Iterable[str]) -> None:
    """Refuse a mapping with keys that we do not know, naming the first."""
    if not isinstance(given, dict):
        refuse(where, given)
    for key in given:
        if key not in known:
            refuse(f"{where}.{key[:80]}" if where else key[:80], given[key])


def find_parts(entries: Mapping[str, Stored], mark: str, suffixes: Iterable[str]) -> dict[str, dict[str, str]]:
    """Every module that has a stored `X.mark`, with those of the other suffixes that it has."""
    found: dict[str, dict[str, str]] = {}
    for name in entries:
        if name.endswith(f".{mark}"):
            stem = name[: -len(mark)]
            found[f"{stem}weight"] = {s: stem + s for s in (mark, *suffixes) if stem + s in entries}
    return found


def integers(pieces: Pieces, name: str, rank: int, dtypes: tuple[str, ...] = ("I32",)) -> NDArray[Any]:
    if name not in pieces:
        raise Mismatch(f"its {name} is missing")
    dtype, array = pieces[name]
    if dtype not in dtypes or array.ndim != rank:
        raise Mismatch(f"its {name} is {dtype} of shape {array.shape}")
    return array


def read_scale(pieces: Pieces, name: str) -> Scale:
    if name not in pieces:
        raise Mismatch(f"its {name} is missing")
    dtype, array = pieces[name]
    if dtype == "BF16":
        return DenseTensor("bfloat16", array).dense32(), "bfloat16"
    if dtype not in ("F16", "F32"):
        raise Mismatch(f"its {name} is {dtype}")
    return array.astype(np.float32), "float16" if dtype == "F16" else "float32"


def same_shape(what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise Mismatch(f"its {what} has shape {shape}, not {expected}")


def fit_group_size(width: int, groups: int, stated: Iterable[int | None]) -> int | None:
    """The group size: one that the configuration states if it fits the scales' shape, else what divides evenly.

    A group wider than the row is the row.
    """
    for size in stated:
        if groups == (1 if size is None else -(-width // size)):
            return size if size is None or size <= width else None
    if groups == 1:
        return None
    if groups < 1 or width % groups:
        raise Mismatch(f"it has {groups} groups in a row of {width}")
    return width // groups


def sort_by_group(g_idx: NDArray[Any] | None, width: int, groups: int, size: int | None) -> NDArray[np.int32] | None:
    """The order that sorts columns by group, or None when they are sorted (or g_idx was never filled: all −1)."""
    if g_idx is None or size is None or np.all(g_idx == -1):
        return None
    same_shape("g_idx", g_idx.shape, (width,))
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise Mismatch("its g_idx names groups that it has not")
    expected = np.arange(width, dtype=np.int64) // size
    if np.array_equal(g_idx, expected):
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], expected):
        raise Mismatch("its g_idx makes groups of unequal size")
    return order.astype(np.int32)
