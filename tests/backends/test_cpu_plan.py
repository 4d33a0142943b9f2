"""What the planner may and may not do with memory, and what has no panel layout of its own."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from numpy.typing import NDArray

from miaotui.backends.cpu import CpuBackend, _native
from miaotui.backends.cpu.nodes import LinearNode, SelectNode, Value
from miaotui.backends.cpu.plan import place
from miaotui.backends.cpu.weights import Linear, Matrix, matrix, stored_matrix
from miaotui.backends.ops import CacheSpec, ComputeType, Step, StepShape
from miaotui.errors import ResourceError
from miaotui.hardware import detect
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import DenseTensor, GroupedTensor

SHAPE = StepShape(max_tokens=4, max_seqs=1, max_logits_rows=2, max_model_len=16)


def square() -> Linear:
    return Linear((matrix(_native.Pool(1), _native.Heap(), DenseTensor("float32", np.eye(32, dtype=np.float32))),))


@pytest.mark.parametrize("read_again", [False, True])
def test_a_residual_is_overwritten_only_where_it_is_last_read(read_again: bool) -> None:
    x, residual, total, later = Value(32), Value(32), Value(32), Value(32, of_logits=True)
    nodes = [
        LinearNode([x], residual, square()),
        LinearNode([x, residual], total, square()),
        SelectNode([residual if read_again else total], later),
    ]
    places, (lasting,) = place([LinearNode([], x, square()), *nodes], SHAPE, [100])
    assert (places.offset[total] == places.offset[residual]) is not read_again
    taken = {lasting: 112, places.offset[x]: 128, places.offset[residual]: 128}
    for begin, size in taken.items():
        assert all(begin + size <= other or other + taken[other] <= begin for other in taken if other != begin)
    assert places.floats >= max(begin + size for begin, size in taken.items())


class Remembering:
    """A store that gives back what it was given."""

    def __init__(self) -> None:
        self.kept: dict[str, _native.PackedWeight] = {}

    def take(self, description: str) -> _native.PackedWeight | None:
        return self.kept.get(description)

    def put(self, description: str, weight: _native.PackedWeight) -> None:
        self.kept[description] = weight


@pytest.mark.parametrize("group", [24, 32])
def test_groups_without_a_panel_layout_keep_their_values(group: int) -> None:
    """Groups of 24 are held as float32, in the input's own order even where the codes are not, kept or made anew."""
    rng = np.random.default_rng(group)
    scheme = QuantScheme(4, group, True)
    codes = rng.integers(0, 16, (20, 96), dtype=np.uint8)
    scale = rng.random((20, 96 // group)).astype(np.float16).astype(np.float32)
    tensor = GroupedTensor(scheme, codes, scale, perm=rng.permutation(96).astype(np.int32))
    pool, heap, store = _native.Pool(1), _native.Heap(), Remembering()
    for _ in ("made", "kept"):
        packed: Matrix = stored_matrix(pool, heap, tensor, store)
        values = packed.packed.dequantise()
        if packed.perm is not None:
            values = values[:, np.argsort(packed.perm)]
        assert np.array_equal(values, tensor.dense32())
        assert (packed.perm is None) == (group == 24)
        assert packed.packed.code == ("float32" if group == 24 else "int4")


def test_recoding_needs_memory_for_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = GroupedTensor(
        QuantScheme(4, 32, True, "float16"), np.zeros((64, 32), np.uint8), np.ones((64, 1), np.float32), None
    )
    for free, enough in ((64 * 32, True), (64 * 32 - 1, False)):
        monkeypatch.setattr(detect, "available_memory", lambda free=free: free)
        backend = CpuBackend(SHAPE, CacheSpec(), compute="int8-batch", threads=1)
        table = backend.ops.prepare_embedding(DenseTensor("float32", np.eye(32, dtype=np.float32)))
        weight = backend.ops.prepare_linear([tensor])
        with nullcontext() if enough else pytest.raises(ResourceError, match="Recoded weights take"):
            backend.record(lambda ops, table=table, weight=weight: ops.linear(ops.embed(table), weight))


def random_grouped(
    rng: np.random.Generator,
    height: int,
    width: int,
    bits: int,
    group: int | None,
    *,
    symmetric: bool = True,
    by_token: bool = False,
) -> GroupedTensor:
    codes = rng.integers(0, 1 << bits, (height, width), dtype=np.uint8)
    scale = np.full((height, width // (group or width)), 0.01, np.float32)
    minimum = None if symmetric else np.full_like(scale, -0.0625)
    return GroupedTensor(QuantScheme(bits, group, symmetric, "float16"), codes, scale, minimum, by_token=by_token)


def mlp(
    isa: str, compute: ComputeType, gate_up: list[GroupedTensor], down: GroupedTensor, count: int, *, fuse: bool
) -> NDArray[np.float32]:
    """What a gated MLP makes of so many rows."""
    shape = StepShape(max_tokens=24, max_seqs=1, max_logits_rows=24, max_model_len=32)
    backend = CpuBackend(shape, CacheSpec(), compute=compute, isa=isa, threads=2, fuse=fuse)
    ops = backend.ops
    table = DenseTensor("float32", np.random.default_rng(1).random((24, 64), np.float32))
    both, one, embedding = ops.prepare_linear(gate_up), ops.prepare_linear([down]), ops.prepare_embedding(table)
    executor = backend.record(lambda o: o.linear(o.gated(o.linear(o.embed(embedding), both), "silu"), one))
    executor.allocate_cache(2)
    ids = np.arange(count, dtype=np.int32)
    ends, rows = np.array([0, count], np.int32), np.array([count], np.int32)
    return executor.run(Step(ids, ids, ends, rows, np.zeros((1, 2), np.int32), ids)).copy()


@pytest.mark.parametrize("compute", ["auto", "int8-batch"])
@pytest.mark.parametrize("isa", _native.isas())
def test_a_linear_whose_input_is_coded_by_token_may_feed_one_whose_is_not(isa: str, compute: ComputeType) -> None:
    rng = np.random.default_rng(0)
    gate_up = [random_grouped(rng, 96, 64, 8, None, by_token=True) for _ in range(2)]
    down = random_grouped(rng, 64, 96, 4, 32)
    results = [mlp(isa, compute, gate_up, down, 24, fuse=fuse) for fuse in (True, False)]
    assert np.array_equal(*results)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("isa", _native.isas())
def test_what_is_handed_on_has_the_sums_that_its_weights_ask_for(isa: str, group: int, symmetric: bool) -> None:
    """Those of 16 for groups of 16, totals for minima: few rows and many."""
    rng = np.random.default_rng(group)
    gate_up = [random_grouped(rng, 96, 64, 4, 32) for _ in range(2)]
    down = random_grouped(rng, 64, 96, 4, group, symmetric=symmetric)
    for count in (1, 3, 24):
        handed, apart = (mlp(isa, "auto", gate_up, down, count, fuse=fuse) for fuse in (True, False))
        assert np.abs(apart).max() > 0.0
        assert np.array_equal(handed, apart)


@pytest.mark.parametrize("compute", ["auto", "fp32", "int8-batch"])
@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("height", [8, 1000, 1024])
def test_the_likeliest_are_noted_on_the_way(isa: str, compute: ComputeType, height: int) -> None:
    """The first of equals, over threads, panels and lanes; another array's rows are not this run's."""
    rng = np.random.default_rng(height)
    codes, scale = rng.integers(0, 16, (height, 32), dtype=np.uint8), np.full((height, 1), 0.01, np.float32)
    codes = np.resize(codes[: height // 4], codes.shape)  # every result four times, in the same panel, thread, or none
    shape = StepShape(max_tokens=24, max_seqs=1, max_logits_rows=24, max_model_len=32)
    backend = CpuBackend(shape, CacheSpec(), compute=compute, isa=isa, threads=3)
    table = backend.ops.prepare_embedding(DenseTensor("float32", rng.standard_normal((24, 32)).astype(np.float32)))
    head = backend.ops.prepare_linear([GroupedTensor(QuantScheme(4, 32, True, "float16"), codes, scale, None)])
    executor = backend.record(lambda ops: ops.linear(ops.select_rows(ops.embed(table)), head))
    executor.allocate_cache(2)
    for count in (1, 3, 24):
        ids = np.arange(count, dtype=np.int32)
        ends, context = np.array([0, count], np.int32), np.array([count], np.int32)
        logits = executor.run(Step(ids, ids, ends, context, np.zeros((1, 2), np.int32), ids[::-1].copy()))
        wanted = logits.argmax(axis=1).tolist()
        assert executor.likeliest(logits, range(count)) == wanted
        assert executor.likeliest(logits, [count - 1]) == wanted[-1:]
        assert executor.likeliest(logits.copy(), range(count)) is None
