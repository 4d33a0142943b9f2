"""Threads that keep to their seats, and weights that lie beside the threads that read them.

On a machine with one memory node nothing can be seen of where weights go, only that answers stay what they are; the
last tests need two.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from miaotui import LLM, SamplingParams
from miaotui.backends.cpu import _native, backend
from miaotui.backends.cpu.weights import Matrix, matrix
from miaotui.hardware.processors import Seat, affinity, memory_nodes
from miaotui.quant.tensor import DenseTensor
from tests.backends.test_cpu_linear import ISAS, LinearProgram, packed, stored

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are bound on Linux only")
NODES = memory_nodes(affinity())


def may_run_on(task: str) -> str:
    lines = Path(f"/proc/self/task/{task}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list"))


def test_threads_keep_to_their_seats() -> None:
    before, cpus = set(os.listdir("/proc/self/task")), affinity()
    pool = _native.Pool(3, [(0, cpus), (0, cpus[:1]), (0, cpus[-1:])])
    matrix(pool, _native.Heap(), DenseTensor("float32", np.eye(64, dtype=np.float32)))  # all have begun
    workers = set(os.listdir("/proc/self/task")) - before
    assert sorted(may_run_on(task) for task in workers) == sorted([str(cpus[0]), str(cpus[-1])])


def test_the_caller_keeps_to_its_seat_while_it_works() -> None:
    cpus, seen, done = affinity(), set(), threading.Event()
    caller = str(threading.get_native_id())

    def watch() -> None:
        while not done.is_set():
            seen.add(may_run_on(caller))

    free = may_run_on(caller)
    watcher = threading.Thread(target=watch)
    watcher.start()
    _native.probe_bandwidth(1, 1, 0.2, [(0, cpus[-1:])])
    done.set()
    watcher.join()
    assert str(cpus[-1]) in seen
    assert may_run_on(caller) == free


def test_a_pool_has_a_seat_for_each_thread() -> None:
    with pytest.raises(ValueError, match="a seat for each thread, or none"):
        _native.Pool(2, [(0, [0])])


@pytest.mark.parametrize("compute", ["auto", "int8-batch"])
def test_seats_change_no_answer(demo_gguf: Path, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a node that is named does not exist, so that nothing can be moved to it."""
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompts = [list(range(5, 45)), [7, 8, 9]]

    def tokens() -> list[list[int]]:
        outputs = LLM(str(demo_gguf), max_model_len=64, compute=compute, threads=2).generate(prompts, params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    plain = tokens()
    asked: list[int] = []

    def two_nodes(threads: int) -> list[Seat]:
        asked.append(threads)
        return [(node, affinity()) for node in range(threads)]

    monkeypatch.setattr(backend, "seats", two_nodes)
    assert tokens() == plain
    assert asked == [2]


# -- two nodes -----------------------------------------------------------------------------------------------
needs_two = pytest.mark.skipif(
    len(NODES) < 2 or platform.machine() != "x86_64", reason="this machine has one memory node"
)


def nodes_of(weight: _native.PackedWeight, first: float, last: float) -> Counter[int]:
    """Where the pages of a part of a weight's codes lie. They are read first: what the kernel has under way ends so."""
    raw = weight.raw
    raw[::4096].sum()
    size = weight.shape[0] * weight.shape[1] * {"int4": 1, "int8": 2, "float32": 8}[weight.code] // 2
    begin = raw.ctypes.data
    places = range((begin + int(first * size) + 4095) & ~4095, begin + int(last * size), 4096)
    pages, status = (ctypes.c_void_p * len(places))(*places), (ctypes.c_int * len(places))()
    move_pages = 279
    assert ctypes.CDLL(None).syscall(move_pages, 0, len(places), pages, None, status, 0) == 0
    return Counter(status)


def kept(weight: Matrix, folder: Path) -> Matrix:
    """The same, mapped from a file."""
    path = folder / "weight"
    path.write_bytes(bytes(weight.packed.raw))
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return Matrix(_native.PackedWeight.mapped(weight.packed.form, data))


@needs_two
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("kind", ["w4g32", "w8g32", "float32"])
def test_weights_lie_beside_the_threads_that_read_them(kind: str, mapped: bool, tmp_path: Path) -> None:
    """But for a huge page at each border, which is one thread's or the other's."""
    (here, near), (there, far), *_ = NODES.items()
    rng = np.random.default_rng(3)
    height, width = {"w4g32": 32768, "w8g32": 16384, "float32": 4096}[kind], 1024
    tensor = stored(kind, height, width, rng)
    weight = matrix(_native.Pool(1, [(here, near)]), _native.Heap(), tensor)
    assert set(nodes_of(weight.packed, 0.65, 0.85)) == {here}
    if mapped:
        weight = kept(weight, tmp_path)
    x = rng.standard_normal((2, width)).astype(np.float32)
    plain = LinearProgram(ISAS[0], x, packed(tensor), threads=4).run()
    seats = [(here, near), (here, near), (there, far), (there, far)]
    program = LinearProgram(ISAS[0], x, weight, threads=4, seats=seats)
    assert np.array_equal(program.run(), plain)
    assert set(nodes_of(weight.packed, 0.15, 0.35)) == {here}
    assert set(nodes_of(weight.packed, 0.65, 0.85)) == {there}


@needs_two
def test_what_a_thread_packs_lies_beside_it() -> None:
    (here, near), (there, far), *_ = NODES.items()
    pool = _native.Pool(2, [(there, far), (here, near)])
    weight = matrix(pool, _native.Heap(), stored("w8g32", 16384, 1024, np.random.default_rng(4)))
    assert set(nodes_of(weight.packed, 0.15, 0.35)) == {there}
    assert set(nodes_of(weight.packed, 0.65, 0.85)) == {here}
