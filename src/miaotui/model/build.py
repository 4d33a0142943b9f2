"""From MODEL to something that runs: find it, read its configuration, hand its weights to a backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from miaotui.backends.ops import Backend, CacheSpec, CacheType, ComputeType, Executor, StepShape
from miaotui.checkpoint import Checkpoint, open_checkpoint, resolve
from miaotui.errors import DependencyError, RequestError, UsageError
from miaotui.hardware.detect import available_memory
from miaotui.model import dummy
from miaotui.model.decoder import forward
from miaotui.model.families import describe, read_spec
from miaotui.model.spec import ModelSpec
from miaotui.model.tokenizer import Tokenizer
from miaotui.model.weights import prepare_weights

if TYPE_CHECKING:
    from miaotui.model.chat import ChatTemplate
    from miaotui.model.packed import PackedFile

T = TypeVar("T")

LEAST_TO_KEEP = 256 << 20
"""Smaller checkpoints pack in an instant, and are not kept packed."""

MIN_LOGITS_ROWS = 64
"""Rows of logits that a step may ask for at least, so that scoring a text takes few steps."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run steps."""

    spec: ModelSpec
    tokenizer: Tokenizer
    executor: Executor
    checkpoint: Checkpoint

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's own, None when it has none; read when first asked for, since plain prompts need none."""
        from miaotui.model.chat import ChatTemplate

        try:
            return ChatTemplate.from_checkpoint(self.checkpoint, self.tokenizer)
        except RequestError:
            return None


def load(
    model: str,
    *,
    device: str = "auto",
    compute: str = "auto",
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    max_logits_rows: int | None = None,
    threads: int | None = None,
    keep_packed: bool = True,
    greedy_screen: bool = True,
    beside: Executor | None = None,
) -> LoadedModel:
    """Load MODEL. Weights are streamed: beside what the backend keeps, one stacked matrix at most is in memory.

    device: `cpu` (what `auto` means), `cuda`, or `reference` (PyTorch on the CPU). compute: `fp32` keeps activations
    exact where `auto` quantises them; `int8-batch` multiplies recoded weights in steps of many rows.
    kv_cache_dtype: `bf16` (what `auto` means), `fp32`, `int8`.
    max_model_len: None for what the model's configuration promises. The executor's cache is not allocated yet.
    keep_packed: keep a large model's packed weights on disk, and use those kept by an earlier load.
    greedy_screen: keep the head once more in 4 bits where that makes greedy steps of one or two rows faster.
    beside: an executor of the same device whose threads to share; the two must never run at the same time.

    Raises UsageError, ModelNotFoundError, CheckpointError, UnsupportedModelError, DependencyError, ResourceError.
    """
    checkpoint, tokenizer = _open(model)
    spec, executor = build(
        checkpoint,
        device=device,
        compute=compute,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_logits_rows=max_logits_rows,
        threads=threads,
        keep_packed=keep_packed,
        greedy_screen=greedy_screen,
        beside=beside,
    )
    return LoadedModel(spec, tokenizer, executor, checkpoint)


def _open(model: str) -> tuple[Checkpoint, Tokenizer]:
    """A model's files and tokenizer; of a `dummy:…` name, which needs the memory to be there, what stands for them."""
    if dummy.is_dummy(model):
        made = dummy.open_dummy(model)
        made.check_memory(available_memory())
        return made, made.tokenizer()
    checkpoint = open_checkpoint(resolve(model))
    describe(checkpoint)  # a model that is not supported is refused for that, before anything else it may lack
    return checkpoint, Tokenizer.from_checkpoint(checkpoint)


def build(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    compute: str = "auto",
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    max_logits_rows: int | None = None,
    threads: int | None = None,
    beside: Executor | None = None,
    keep_packed: bool = True,
    greedy_screen: bool = True,
) -> tuple[ModelSpec, Executor]:
    """`load` without text: only the checkpoint's configuration and weights are read."""
    make_backend = _choose("device", device, BACKENDS)
    cache_type = _choose("kv_cache_dtype", kv_cache_dtype, CACHE_TYPES)
    compute_type = _choose("compute", compute, COMPUTE_TYPES)
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    for name, value in {**limits, "max_logits_rows": max_logits_rows, "threads": threads}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}.", "It must be at least 1.")
    _check_threads(threads)
    spec, names = read_spec(checkpoint, max_model_len)
    shape = StepShape(
        max_tokens=max_num_batched_tokens,
        max_seqs=max_num_seqs,
        max_logits_rows=max_logits_rows or min(max(max_num_seqs, MIN_LOGITS_ROWS), max_num_batched_tokens),
        max_model_len=_length(spec, max_model_len),
    )
    cache = CacheSpec(tuple(layer.attention for layer in spec.layers), cache_type)
    with _packed_file(checkpoint, make_backend is _cpu and keep_packed) as store:
        backend = make_backend(shape, cache, compute_type, threads, store, beside, greedy_screen)
        weights = prepare_weights(backend.ops, spec, names, checkpoint)
        executor = backend.record(lambda ops: forward(ops, spec, weights))
    return spec, executor


@contextmanager
def _packed_file(checkpoint: Checkpoint, wanted: bool) -> Iterator[PackedFile | None]:
    """The checkpoint's packed weights on disk, saved when the load that needed them ends well; not made-up ones."""
    if not wanted or isinstance(checkpoint, dummy.DummyCheckpoint) or checkpoint.nbytes < LEAST_TO_KEEP:
        yield None
        return
    from miaotui.model.packed import PackedFile

    store = PackedFile.of(checkpoint)
    yield store
    store.save()


def _check_threads(threads: int | None) -> None:
    """Refuse so many that they would only wait for each other's turn."""
    processors = os.cpu_count() or 1
    most = max(16, 4 * processors)
    if threads is not None and threads > most:
        cause = f"threads is {threads}, and this machine has {processors} processors."
        raise UsageError(cause, f"Give at most {most}, or leave it out for one a physical core, which is fastest.")


def _length(spec: ModelSpec, wanted: int | None) -> int:
    if wanted is None:
        return spec.max_position
    if not 1 <= wanted <= spec.max_position:
        cause = f"max_model_len is {wanted}; this model reaches {spec.max_position} positions."
        raise UsageError(cause, f"Choose a --max-model-len from 1 to {spec.max_position}.")
    return wanted


# -- backends, each resolved once ------------------------------------------------------------------------
MakeBackend = Callable[[StepShape, CacheSpec, ComputeType, int | None, Any, Any, bool], Backend[Any]]


def _cpu(
    shape: StepShape, cache: CacheSpec, compute: ComputeType, threads: int | None, store: Any, beside: Any, screen: bool
) -> Backend[Any]:
    from miaotui.backends.cpu import CpuBackend

    return CpuBackend(shape, cache, compute=compute, threads=threads, store=store, beside=beside, screen=screen)


def _torch(device: str) -> MakeBackend:
    def make(
        shape: StepShape,
        cache: CacheSpec,
        compute: ComputeType,
        threads: int | None,
        _store: None,
        _beside: Any,
        _screen: bool,
    ) -> Backend[Any]:
        try:
            from miaotui.backends.reference.backend import ReferenceBackend
        except ImportError as error:
            cause = f"This device runs on PyTorch, which is not installed ({error})."
            raise DependencyError(
                cause, "Install it: pip install 'miaotui[reference]', or use --device cpu."
            ) from error
        return ReferenceBackend(shape, cache, compute=compute, device=device, threads=threads)

    return make


BACKENDS: dict[str, MakeBackend] = {"auto": _cpu, "cpu": _cpu, "reference": _torch("cpu"), "cuda": _torch("cuda")}
CACHE_TYPES: dict[str, CacheType] = {"auto": "bf16", "bf16": "bf16", "fp32": "fp32", "int8": "int8"}
COMPUTE_TYPES: dict[str, ComputeType] = {"auto": "auto", "fp32": "fp32", "int8-batch": "int8-batch"}


def _choose(name: str, value: str, choices: dict[str, T]) -> T:
    if value not in choices:
        raise UsageError(f"{name} is {value!r:.60}.", f"Choose one of {', '.join(choices)}.")
    return choices[value]
