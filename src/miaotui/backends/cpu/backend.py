"""The CPU backend: a recorder for the weights and the step, and the executor that replays it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.cpu import _native
from miaotui.backends.cpu.emit import Emitter, Place, Widen
from miaotui.backends.cpu.nodes import AttentionNode, ExpertsNode, LinearNode, Node, RopeNode, Value
from miaotui.backends.cpu.ops import CpuOps
from miaotui.backends.cpu.plan import fused, place, split_inputs
from miaotui.backends.cpu.weights import Matrix, WeightStore, screen_of
from miaotui.backends.ops import CacheSpec, ComputeType, Ops, OpWork, Rope, Step, StepShape
from miaotui.errors import ResourceError, UsageError
from miaotui.hardware import detect
from miaotui.hardware.processors import seats

SCREEN_LEAST = 0.05
"""Of what a step reads, the least that a screen must save: it takes memory."""
SCREEN_MOST = 300_000_000
"""Elements of a head that a screen is made of: about 0.2 seconds' work."""


def _best_isa() -> str:
    """The first of those that run; UsageError if MIAOTUI_ISA names none of them."""
    known: list[str] = _native.isas()
    wanted = os.environ.get("MIAOTUI_ISA")
    if wanted and wanted != known[0]:
        raise UsageError(
            f"MIAOTUI_ISA names {wanted!r}, and this processor has no such kernels.",
            f"Set it to one of {', '.join(known)}, or not at all.",
        )
    return known[0]


class CpuBackend:
    """Native kernels on `threads` threads (default: the physical cores this process may use).

    compute "auto" multiplies integer weights with activations quantised to int8, per 32 elements or, where
    the checkpoint says so (w8a8), by token. "int8-batch" does so in steps of few rows; linears of 16 rows and
    more multiply a second copy of the weights, recoded to int8 with one scale a row, with activations quantised
    per 64 elements, both turned first (native/pack.h). "fp32" computes everything in float32, exactly as stored.
    `screen` keeps the head once more in 4 bits where that pays, by which greedy steps of one or two rows find the
    greatest logit without reading all of it (native/screen.h).
    `isa` names an instruction set of `_native.isas()` (default: the best, or the environment's MIAOTUI_ISA). `beside`
    lends its threads: the two executors must never run at the same time.
    """

    def __init__(
        self,
        shape: StepShape,
        cache: CacheSpec,
        *,
        compute: ComputeType = "auto",
        threads: int | None = None,
        isa: str | None = None,
        fuse: bool = True,
        screen: bool = True,
        store: WeightStore | None = None,
        beside: CpuExecutor | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads cannot compute anything.", "Give --threads a positive number.")
        self.shape = shape
        self.cache = cache
        self._quantised = compute != "fp32"
        self._wide = compute == "int8-batch"
        self._isa = isa or _best_isa()
        self._fuse = fuse
        self._wants_screen = screen
        self._store = store
        self._pool = beside.pool if beside is not None else _pool(threads or detect.usable_cores())
        self._ops = CpuOps(self._pool, store)

    @property
    def ops(self) -> Ops[Value]:
        return self._ops

    def record(self, forward: Callable[[Ops[Value]], Value]) -> CpuExecutor:
        """Lead the decoder through once and turn what it did into a native program."""
        logits = forward(self._ops)
        nodes = fused(self._ops.nodes, self._quantised) if self._fuse else self._ops.nodes
        rows = self.shape
        ropes = _ropes(nodes)
        tables = [rows.max_tokens * len(rope.inv_freq) for rope in ropes for _ in ("cos", "sin")]
        places, lasting = place(nodes, rows, tables)
        program = _native.Program(
            self._pool,
            self._isa,
            rows.max_tokens,
            rows.max_seqs,
            rows.max_logits_rows,
            rows.max_model_len,
            places.floats,
        )
        turns: dict[Rope, tuple[Place, Place]] = {}
        for index, rope in enumerate(ropes):
            half = len(rope.inv_freq)
            cos, sin = (lasting[2 * index], half), (lasting[2 * index + 1], half)
            program.angles(np.ascontiguousarray(rope.inv_freq, dtype=np.float32), rope.factor, cos, sin)
            turns[rope] = (cos, sin)
        emitter = Emitter(program, places, turns, self.cache.type, self._quantised, self._widen())
        ops = split_inputs(nodes)
        for node, parts in ops:
            emitter.emit(node, parts)
        work = [OpWork()] * len(ropes) + [_op_work(node, parts) for node, parts in ops]
        self._screen(program, ops, work)
        program.finish()
        ways = f"quantised={self._quantised} wide={self._wide} fuse={self._fuse}"
        cache_format = f"cpu {self._isa} {self.cache.type} {ways} {_build()}"
        return CpuExecutor(program, (places.offset[logits], logits.width), rows, work, cache_format, self._pool)

    def _widen(self) -> Widen | None:
        """Recodes weights one after another into memory of their own, in the order of the step."""
        if not self._wide:
            return None
        linears = [n for n in self._ops.nodes if isinstance(n, LinearNode) and not n.exact]
        needed = sum(m.height * m.width for n in linears for m in n.weight.parts if m.in_groups)
        free = detect.available_memory()
        if needed > free:
            cause = f"Recoded weights take {needed / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free."
            raise ResourceError(cause, "Leave --compute int8-batch out, or free memory.")
        heap = _native.Heap()
        return lambda weight: _native.PackedWeight.wide(self._pool, heap, weight, self._isa)

    def _screen(self, program: _native.Program, ops: list[tuple[Node, list[int]]], work: list[OpWork]) -> None:
        """Give the head a screen where one pays, and note what it saves."""
        share, (node, parts) = program.screen_share(), ops[-1]
        if not self._wants_screen or share is None or not isinstance(node, LinearNode):
            return
        head, read = node.weight.parts[parts[0]], sum(op.bytes for op in work)
        saved = int(head.nbytes * (1.0 - share))
        made = head.height * head.width  # bytes of the panels that it is made of, at the most
        if saved < SCREEN_LEAST * read or made > SCREEN_MOST or 2 * made > detect.available_memory():
            return
        program.screen(screen_of(self._pool, head.packed, self._isa, self._store))
        work[-1] = replace(work[-1], greedy_bytes=head.nbytes - saved)


class CpuExecutor:
    """Replays the program: one native call a step, without the GIL."""

    def __init__(
        self,
        program: _native.Program,
        logits: Place,
        shape: StepShape,
        op_work: list[OpWork],
        cache_format: str,
        pool: _native.Pool,
    ) -> None:
        self.shape = shape
        self.pool = pool
        self.cache_format = cache_format
        self.vocab_size = logits[1]
        self.weight_bytes = sum(op.bytes for op in op_work)
        self.greedy_bytes = sum(op.greedy_bytes for op in op_work)
        self.block_bytes: int = program.block_bytes
        self.runs_on: bool = program.notes_greatest
        self._op_work = op_work
        self._program = program
        self._logits = program.view(logits, shape.max_logits_rows)
        self._last: NDArray[np.float32] = self._logits[:0]

    def free_memory(self) -> int:
        return detect.available_memory()

    def allocate_cache(self, blocks: int) -> None:
        self._program.allocate_cache(blocks)

    def run(self, step: Step) -> NDArray[np.float32]:
        self._program.run(
            step.tokens,
            step.positions,
            step.query_start,
            step.context_len,
            step.block_table,
            step.logits_rows,
            step.greedy,
        )
        self._last = self._logits[: len(step.logits_rows)]
        return self._last

    def run_on(self, step: Step, steps: int, ends: Sequence[int]) -> NDArray[np.int32]:
        chosen = np.empty((steps, len(step.context_len)), np.int32)
        self._last = self._logits[:0]
        ran = self._program.run_on(
            step.tokens,
            step.positions,
            step.query_start,
            step.context_len,
            step.block_table,
            step.logits_rows,
            ends,
            chosen,
        )
        return chosen[:ran]

    def likeliest(self, logits: NDArray[np.float32], rows: Sequence[int]) -> list[int] | None:
        if logits is not self._last:
            return None
        found: list[int] | None = self._program.likeliest(rows)
        return found

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, destination in pairs:
            self._program.copy_block(source, destination)

    def read_block(self, block: int) -> NDArray[np.uint8]:
        content = np.empty(self.block_bytes, np.uint8)
        self._program.read_block(block, content)
        return content

    def write_block(self, block: int, content: NDArray[np.uint8]) -> None:
        self._program.write_block(block, content)

    def start_profile(self) -> None:
        """Begin to time every op of the steps that follow (on the first thread, waiting included)."""
        self._program.set_profiling(True)

    def stop_profile(self) -> tuple[list[tuple[str, float]], int]:
        """(op, seconds) in order of execution, summed over the steps since `start_profile`, and their number."""
        rows, steps = self._program.profile(), self._program.profiled_runs
        self._program.set_profiling(False)
        return rows, steps

    def op_work(self) -> list[OpWork]:
        """What each op must do, in the profile's order."""
        return self._op_work

    def close(self) -> None:
        del self._last, self._logits, self._program, self.pool


def _pool(threads: int) -> _native.Pool:
    return _native.Pool(threads, seats(threads))


def _ropes(nodes: list[Node]) -> list[Rope]:
    """The distinct rotary embeddings, in order of first use."""
    found: dict[Rope, None] = {}
    for node in nodes:
        if isinstance(node, RopeNode | AttentionNode) and node.attention.rope is not None:
            found.setdefault(node.attention.rope)
    return list(found)


def _build() -> str:
    """Which build of the kernels this is: another may round otherwise."""
    file = Path(_native.__file__).stat()
    return f"{file.st_size}-{file.st_mtime_ns}"


def _op_work(node: Node, parts: list[int]) -> OpWork:
    of_logits = node.output.of_logits
    if isinstance(node, LinearNode):
        return _reading([node.weight.parts[i] for i in parts], of_logits)
    if isinstance(node, ExpertsNode):
        every = _reading([m for e in (*node.weight.gate_up, *node.weight.down) for m in e.parts], False)
        used, count = node.top_k, len(node.weight.down)
        size = every.bytes * used // count
        return OpWork(size, every.products * used // count, False, size)
    return OpWork(of_logits=of_logits)


def _reading(weights: list[Matrix], of_logits: bool) -> OpWork:
    size = sum(m.nbytes for m in weights)
    return OpWork(size, sum(m.height * m.width for m in weights), of_logits, size)
