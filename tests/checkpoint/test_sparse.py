"""compressed-tensors' sparse-bitmask, against its definition written out element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaotui.checkpoint import open_checkpoint
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.quant.bitmask import from_bitmask, to_bitmask
from miaotui.quant.rounding import bfloat16_bits
from miaotui.quant.tensor import DenseTensor
from tests.checkpoint.making import random, write_folder

CONFIG = {
    "quant_method": "compressed-tensors",
    "version": "0.12.2",
    "sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.4, "sparsity_structure": "unstructured"},
}


def sparse(shape: tuple[int, int], share: float = 0.5, seed: int = 0) -> Any:
    values = random(shape, seed)
    return np.where(np.random.default_rng(seed + 1).random(shape) < share, np.float32(0), values)


def slow_parts(dense: Any, name: str = "m") -> dict[str, Any]:
    """What the package's BitmaskCompressor stores, one element at a time."""
    values, offsets = [], []
    mask = np.zeros((dense.shape[0], -(-dense.shape[1] // 8)), np.uint8)
    for r, row in enumerate(dense):
        offsets.append(len(values))
        for c, value in enumerate(row):
            if value != 0:
                values.append(value)
                mask[r, c // 8] |= 1 << (c % 8)
    return {
        f"{name}.compressed": np.array(values, dense.dtype),
        f"{name}.bitmask": mask,
        f"{name}.row_offsets": np.array(offsets, np.int64),
        f"{name}.shape": np.array(dense.shape, np.int64),
    }


@given(rows=st.integers(1, 5), width=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_layout(rows: int, width: int, share: float, seed: int) -> None:
    dense = sparse((rows, width), share, seed)
    made, slow = to_bitmask(dense, dense != 0), slow_parts(dense)
    for name, array in (("compressed", made.values), ("bitmask", made.mask), ("row_offsets", made.offsets)):
        np.testing.assert_array_equal(array, slow[f"m.{name}"])
    np.testing.assert_array_equal(from_bitmask(made, width), dense)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_reading(tmp_path: Path, kind: str) -> None:
    dense = sparse((6, 13))
    parts = slow_parts(dense.astype(np.float16) if kind == "F16" else dense)
    if kind == "BF16":
        parts["m.compressed"] = ("BF16", bfloat16_bits(parts["m.compressed"]))
    checkpoint = open_checkpoint(write_folder(tmp_path, {**parts, "norm.weight": random((4,))}, CONFIG))
    assert sorted(checkpoint.names()) == ["m.weight", "norm.weight"]
    tensor = checkpoint.tensor("m.weight")
    assert isinstance(tensor, DenseTensor)
    assert tensor.type == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    rounded = {"F32": dense, "F16": dense.astype(np.float16), "BF16": DenseTensor("bfloat16", bfloat16_bits(dense))}
    meant = rounded[kind].dense32() if kind == "BF16" else rounded[kind]
    np.testing.assert_array_equal(tensor.dense32(), meant.astype(np.float32))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("compressed", None),
        ("row_offsets", None),
        ("shape", None),
        ("compressed", np.zeros(7, np.float32)),
        ("compressed", np.zeros((3, 2), np.float32)),
        ("compressed", np.zeros(3, np.int32)),
        ("bitmask", np.full((6, 2), 255, np.uint8)),
        ("bitmask", np.zeros((6, 3), np.uint8)),
        ("bitmask", np.zeros(6, np.uint8)),
        ("row_offsets", np.zeros(6, np.int64)),
        ("row_offsets", np.zeros(5, np.int64)),
        ("shape", np.array([6, 1 << 40], np.int64)),
        ("shape", np.array([5, 13], np.int64)),
        ("shape", np.array([6], np.int64)),
        ("shape", np.array([6, -13], np.int64)),
    ],
)
def test_damage_is_named(tmp_path: Path, part: str, value: Any) -> None:
    parts = {**slow_parts(sparse((6, 13))), f"m.{part}": value}
    folder = write_folder(tmp_path, {name: array for name, array in parts.items() if array is not None}, CONFIG)
    with pytest.raises(CheckpointError, match=r"damaged 'm\.weight'"):
        open_checkpoint(folder).tensor("m.weight")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**CONFIG, "config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups"),
        ({**CONFIG, "format": "wavelets"}, "wavelets"),
        ({**CONFIG, "hadamard": True}, "hadamard"),
        ({**CONFIG, "sparsity_config": {"format": "sparse-bitmask", "rotated": True}}, "rotated"),
        ({**CONFIG, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**CONFIG, "sparsity_config": ["sparse-bitmask"]}, "sparsity_config"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, config: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        open_checkpoint(write_folder(tmp_path, {"x": random((2,))}, config))
