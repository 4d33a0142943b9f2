"""The CPU backend: a recorder for the weights and the step, and the executor that replays it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.cpu import _native
from miaotui.backends.cpu.emit import Emitter, Place, Widen
from miaotui.backends.cpu.nodes import AttentionNode, ExpertsNode, LinearNode, Node, RopeNode, Value
from miaotui.backends.cpu.ops import CpuOps
from miaotui.backends.cpu.plan import fused, place, split_inputs
from miaotui.backends.cpu.weights import WeightStore
from miaotui.backends.ops import CacheSpec, ComputeType, Ops, Rope, Step, StepShape
from miaotui.errors import ResourceError, UsageError
from miaotui.hardware import detect


class CpuBackend:
    """Native kernels on `threads` threads (default: the physical cores this process may use).

    compute "auto" multiplies integer weights with activations quantised to int8, per 32 elements or, where
    the checkpoint says so (w8a8), by token. "int8-batch" does so in steps of few rows; linears of 16 rows and
    more multiply a second copy of the weights, recoded to int8 with one scale a row, with activations quantised
    per 64 elements, both turned first (native/pack.h). "fp32" computes everything in float32, exactly as stored.
    `isa` names an instruction set of `_native.isas()` (default: the best). `beside` lends its threads: the two
    executors must never run at the same time.
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
        store: WeightStore | None = None,
        beside: CpuExecutor | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads cannot compute anything.", "Give --threads a positive number.")
        self.shape = shape
        self.cache = cache
        self._quantised = compute != "fp32"
        self._wide = compute == "int8-batch"
        self._isa = isa or _native.isas()[0]
        self._fuse = fuse
        self._pool = beside.pool if beside is not None else _native.Pool(threads or detect.usable_cores())
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
        program.finish()
        ways = f"quantised={self._quantised} wide={self._wide} fuse={self._fuse}"
        cache_format = f"cpu {self._isa} {self.cache.type} {ways} {_build()}"
        work = [(0, 0, False)] * len(ropes) + [_op_weights(node, parts) for node, parts in ops]
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


class CpuExecutor:
    """Replays the program: one native call a step, without the GIL."""

    def __init__(
        self,
        program: _native.Program,
        logits: Place,
        shape: StepShape,
        op_weights: list[tuple[int, int, bool]],
        cache_format: str,
        pool: _native.Pool,
    ) -> None:
        self.shape = shape
        self.pool = pool
        self.cache_format = cache_format
        self.vocab_size = logits[1]
        self.weight_bytes = sum(weight_bytes for weight_bytes, _, _ in op_weights)
        self.block_bytes: int = program.block_bytes
        self._op_weights = op_weights
        self._program = program
        self._logits = program.view(logits, shape.max_logits_rows)
        self._last: NDArray[np.float32] = self._logits[:0]

    def free_memory(self) -> int:
        return detect.available_memory()

    def allocate_cache(self, blocks: int) -> None:
        self._program.allocate_cache(blocks)

    def run(self, step: Step) -> NDArray[np.float32]:
        self._program.run(
            step.tokens, step.positions, step.query_start, step.context_len, step.block_table, step.logits_rows
        )
        self._last = self._logits[: len(step.logits_rows)]
        return self._last

    def likeliest(self, logits: NDArray[np.float32], rows: Sequence[int]) -> list[int] | None:
        if logits is not self._last:
            return None
        tokens = np.empty(len(rows), np.int32)
        self._program.likeliest(np.array(rows, np.int32), tokens)
        found: list[int] = tokens.tolist()
        return None if -1 in found else found

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

    def op_weights(self) -> list[tuple[int, int, bool]]:
        """For each op in the profile's order: bytes of weights it reads, products a row, whether rows are logits'."""
        return self._op_weights

    def close(self) -> None:
        del self._last, self._logits, self._program, self.pool


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


def _op_weights(node: Node, parts: list[int]) -> tuple[int, int, bool]:
    of_logits = node.output.of_logits
    if isinstance(node, LinearNode):
        chosen = [node.weight.parts[i] for i in parts]
        return sum(m.nbytes for m in chosen), sum(m.height * m.width for m in chosen), of_logits
    if isinstance(node, ExpertsNode):
        every = [m for e in (*node.weight.gate_up, *node.weight.down) for m in e.parts]
        used, count = node.top_k, len(node.weight.down)
        return (
            sum(m.nbytes for m in every) * used // count,
            sum(m.height * m.width for m in every) * used // count,
            False,
        )
    return 0, 0, of_logits
