"""A folder whose sparse matrices are stored without their zeros, as compressed-tensors' sparse-bitmask.

transformers reads it with compressed-tensors up to 0.12; later ones, and other engines, read dense folders alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.layouts import SPARSE
from miaotui.checkpoint.write import Stored, write_json, write_sharded
from miaotui.compress.writing.dense import STORED, Written, as_type
from miaotui.compress.writing.folder import copy_assets
from miaotui.quant.bitmask import Bitmask, to_bitmask

FORMAT_VERSION = "0.12.2"
"""The last compressed-tensors that has this layout."""

Load = Callable[[], NDArray[Any]]


def write_sparse(
    folder: Path, tensors: Sequence[Written], sparse: Mapping[str, str], config: Mapping[str, Any], source: Checkpoint
) -> None:
    """Weights, configuration and text files; `sparse` names the matrices whose zeros are left out (and their pattern).

    Every sparse matrix is loaded four times: to be announced, and for each of its parts. Memory: one of them.
    """
    pieces: dict[str, tuple[Stored, Load]] = {}
    zeros = total = 0
    for tensor in tensors:
        if tensor.name not in sparse:
            stored = Stored(tensor.name, STORED[tensor.type], tensor.shape)
            pieces[tensor.name] = stored, _dense(tensor)
            continue
        parts = _parts(tensor)
        pieces |= {stored.name: (stored, load) for stored, load in parts}
        total += math.prod(tensor.shape)
        zeros += math.prod(tensor.shape) - parts[0][0].shape[0]
    write_sharded(folder, [stored for stored, _ in pieces.values()], lambda name: pieces[name][1]())
    patterns = sorted(set(sparse.values()))
    sparsity = {
        "format": SPARSE,
        "global_sparsity": zeros / total if total else 0.0,
        "sparsity_structure": patterns[0] if len(patterns) == 1 else "unstructured",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    coded = {"quant_method": "compressed-tensors", "version": FORMAT_VERSION, "sparsity_config": sparsity}
    write_json(folder / "config.json", {**config, "quantization_config": coded})
    copy_assets(source, folder)


def _dense(tensor: Written) -> Load:
    return lambda: as_type(tensor.load(), tensor.type)


def _parts(tensor: Written) -> list[tuple[Stored, Load]]:
    """A matrix's parts; it is known before that it is written how many values there are."""
    stem = tensor.name.removesuffix("weight")
    out, width = tensor.shape
    count = int((as_type(tensor.load(), tensor.type) != 0).sum())

    def part(read: Callable[[Bitmask], NDArray[Any]]) -> Load:
        return lambda: read(_bitmask(tensor))

    return [
        (Stored(stem + "compressed", STORED[tensor.type], (count,)), part(lambda sparse: sparse.values)),
        (Stored(stem + "bitmask", "U8", (out, -(-width // 8))), part(lambda sparse: sparse.mask)),
        (Stored(stem + "row_offsets", "I64", (out,)), part(lambda sparse: sparse.offsets)),
        (Stored(stem + "shape", "I64", (2,)), lambda: np.array([out, width], np.int64)),
    ]


def _bitmask(tensor: Written) -> Bitmask:
    values = as_type(tensor.load(), tensor.type)
    return to_bitmask(values, values != 0)
