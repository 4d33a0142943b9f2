"""The program with its ops fused gives the bits of the program without, on every instruction set; and the reference's
logits, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from miaotui.backends.cpu import CpuBackend, _native
from miaotui.backends.cpu.backend import CpuExecutor
from miaotui.backends.ops import Backend, CacheSpec, ComputeType, Step, StepShape
from miaotui.backends.reference.backend import ReferenceBackend
from miaotui.checkpoint import open_checkpoint
from miaotui.model.decoder import forward
from miaotui.model.families import read_spec
from miaotui.model.weights import prepare_weights


def logits(
    path: Path, isa: str, compute: ComputeType, *, fuse: bool, wanted: int = 16
) -> tuple[NDArray[np.float32], set[str]]:
    """Logits of the last `wanted` of a prompt's 17 tokens, and of one after it; the names of the program's ops."""
    checkpoint = open_checkpoint(path)
    spec, names = read_spec(checkpoint, None)
    shape, cache = StepShape(32, 1, 16, 64), CacheSpec(tuple(layer.attention for layer in spec.layers), "bf16")
    backend: Backend[Any]
    if isa == "reference":
        backend = ReferenceBackend(shape, cache, compute=compute)
    else:
        backend = CpuBackend(shape, cache, compute=compute, threads=2, isa=isa, fuse=fuse)
    weights = prepare_weights(backend.ops, spec, names, checkpoint)
    executor = backend.record(lambda ops: forward(ops, spec, weights))
    executor.allocate_cache(4)
    table = np.arange(4, dtype=np.int32)[None]
    outputs = []
    if isinstance(executor, CpuExecutor):
        executor.start_profile()
    for first, count in ((0, 17), (17, 1)):
        ids = np.arange(count, dtype=np.int32)
        rows = ids[-wanted:]
        ends = np.array([0, count], np.int32)
        step = Step(ids + 500, ids + first, ends, np.array([first + count], np.int32), table, rows)
        outputs.append(executor.run(step).copy())
    ops = {name for name, _ in executor.stop_profile()[0]} if isinstance(executor, CpuExecutor) else set()
    executor.close()
    return np.concatenate(outputs), ops


@pytest.mark.parametrize("compute", ["auto", "int8-batch", "fp32"])
@pytest.mark.parametrize("isa", _native.isas())
def test_fusing_changes_no_bit(demo_gguf: Path, isa: str, compute: ComputeType) -> None:
    fused, few = logits(demo_gguf, isa, compute, fuse=True)
    plain, many = logits(demo_gguf, isa, compute, fuse=False)
    assert np.array_equal(fused, plain)
    assert {"norm", "activate"} <= many
    assert not {"norm", "activate"} & few


@pytest.mark.parametrize("compute", ["auto", "fp32"])
@pytest.mark.parametrize("isa", _native.isas())
def test_a_row_does_not_depend_on_which_others_are_wanted(demo_gguf: Path, isa: str, compute: ComputeType) -> None:
    many, _ = logits(demo_gguf, isa, compute, fuse=True)
    one, _ = logits(demo_gguf, isa, compute, fuse=True, wanted=1)
    assert (len(many), len(one)) == (17, 2)
    assert np.array_equal(many[-2:], one)


def test_recoded_steps_agree_with_the_reference(demo_gguf: Path) -> None:
    """Nearer than to steps that are not recoded; rounding grows over thirty layers, so not much nearer."""
    native, _ = logits(demo_gguf, _native.isas()[0], "int8-batch", fuse=True)
    twin, _ = logits(demo_gguf, "reference", "int8-batch", fuse=True)
    other, _ = logits(demo_gguf, "reference", "auto", fuse=True)
    assert np.abs(native - twin).mean() < 0.75 * np.abs(twin - other).mean()
