"""The reference backend and its executor: each step runs the decoder eagerly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from miaotui.backends.ops import CacheSpec, ComputeType, Ops, Step, StepShape
from miaotui.backends.reference.cache import Cache
from miaotui.backends.reference.memory import memory_needed
from miaotui.backends.reference.ops import ReferenceOps, step_tensors
from miaotui.errors import DependencyError
from miaotui.hardware.detect import available_memory


class ReferenceBackend:
    """PyTorch on `cpu` or `cuda`.

    On the CPU matrices are float32, exactly as dequantised; compute "auto" then simulates the native backend's
    int8 activations for integer weights, "fp32" does not. On a GPU "auto" multiplies in 16 bits instead.

    Raises DependencyError when the device is not there, ResourceError when its memory does not suffice.
    """

    def __init__(
        self,
        shape: StepShape,
        cache: CacheSpec,
        *,
        compute: ComputeType,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # of the process: PyTorch has one pool
        self.shape = shape
        self.device = _device(device)
        on_gpu, exact = self.device.type == "cuda", compute == "fp32"
        self.cache = Cache(cache, self.device)
        quantise, wide = not exact and not on_gpu, compute == "int8-batch" and not on_gpu
        self.ops = ReferenceOps(self.cache, self.device, quantise=quantise, half=not exact and on_gpu, wide=wide)

    def record(self, forward: Callable[[Ops[torch.Tensor]], torch.Tensor]) -> ReferenceExecutor:
        return ReferenceExecutor(self.shape, self.ops, forward)


class ReferenceExecutor:
    """Runs the recorded forward eagerly. `weight_bytes` is learnt from one token, run at once."""

    def __init__(
        self, shape: StepShape, ops: ReferenceOps, forward: Callable[[Ops[torch.Tensor]], torch.Tensor]
    ) -> None:
        self.shape = shape
        self.pool = None
        self.runs_on = True
        self.block_bytes = ops.cache.block_bytes
        kind = f"{ops.cache.spec.type} quantise={ops.quantise} half={ops.half} wide={ops.wide}"
        self.cache_format = f"reference {ops.device.type} {kind} torch {torch.__version__}"
        self._ops = ops
        self._forward = forward
        ops.cache.allocate(1)
        self.vocab_size = self.run(_one_token()).shape[1]
        self.weight_bytes = self.greedy_bytes = sum(ops.touched.values())

    def free_memory(self) -> int:
        if self._ops.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._ops.device)[0])
        return available_memory()

    def allocate_cache(self, blocks: int) -> None:
        with memory_needed(
            self._ops.device, f"a KV cache of {blocks} blocks ({blocks * self.block_bytes / 2**30:.1f} GiB)"
        ):
            self._ops.cache.allocate(blocks)

    def run(self, step: Step) -> NDArray[np.float32]:
        with torch.inference_mode(), memory_needed(self._ops.device, f"a step of {len(step.tokens)} tokens"):
            self._ops.step = step_tensors(step, self._ops.device)
            logits: NDArray[np.float32] = self._forward(self._ops).cpu().numpy()
        return logits

    def run_on(self, step: Step, steps: int, ends: Sequence[int]) -> NDArray[np.int32]:
        chosen: list[NDArray[np.int32]] = []
        for _ in range(steps):
            chosen.append(self.run(step).argmax(axis=1).astype(np.int32))
            if np.isin(chosen[-1], ends).any():
                break
            step = replace(step, tokens=chosen[-1], positions=step.positions + 1, context_len=step.context_len + 1)
        return np.stack(chosen)

    def likeliest(self, logits: NDArray[np.float32], rows: Sequence[int]) -> list[int] | None:
        return None

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        with torch.inference_mode():
            self._ops.cache.copy(pairs)

    def read_block(self, block: int) -> NDArray[np.uint8]:
        return self._ops.cache.read(block)

    def write_block(self, block: int, content: NDArray[np.uint8]) -> None:
        self._ops.cache.write(block, content)

    def close(self) -> None:
        self._ops.cache.layers = []
        self._ops.step = None


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda is not None
        cause = "No usable NVIDIA GPU was found." if built else "This PyTorch was built without CUDA."
        raise DependencyError(cause, "Install a driver and a CUDA build of PyTorch, or use --device cpu.")
    return torch.device(name)


def _one_token() -> Step:
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    return Step(
        tokens=zero,
        positions=zero,
        query_start=np.array([0, 1], np.int32),
        context_len=one,
        block_table=np.zeros((1, 1), np.int32),
        logits_rows=zero,
    )
