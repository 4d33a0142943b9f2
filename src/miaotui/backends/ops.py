"""The op contract: the dozen operations that the decoder is written in.

Two kinds of backend keep it. An *eager* one (`reference`) computes as it is called. A *recording* one (`cpu`)
notes the call once and replays it natively for every step. A buffer `B` is whatever the backend likes: the
decoder only passes it on. Buffers hold float32 rows, `[tokens of the step, width]`, unless said otherwise.

An op never knows which layer it is in; a prepared weight knows how it is coded and where it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from miaotui.quant.tensor import Tensor

B = TypeVar("B")
"""A backend's buffer."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
ComputeType = Literal["auto", "fp32", "int8-batch"]
CacheType = Literal["fp32", "bf16", "int8"]

BLOCK_SIZE = 16
"""Positions in one block of the KV cache, in every backend."""

FEW_ROWS = 2
"""Rows of logits with which an executor may read less of the head (`Executor.greedy_bytes`)."""


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding (RoFormer, Su et al. 2021): pairs of a head's elements turned by position × frequency.

    inv_freq `[rotary_dim / 2]` float32, already scaled (llama3, yarn, …); `factor` multiplies cos and sin
    (yarn's attention factor). `interleaved` pairs neighbours (2i, 2i+1) rather than halves (i, i + rotary_dim/2).
    """

    inv_freq: NDArray[np.float32]
    factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention, all but its weights: heads, scale, mask and what is done to q and k first."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    """A position attends to the last `window` positions, itself included; None means all."""
    softcap: float | None = None
    """scores = softcap · tanh(scores / softcap)."""


@dataclass(frozen=True)
class StepShape:
    """The most that any one step may hold: what a recording backend sizes its arena by."""

    max_tokens: int
    max_seqs: int
    max_logits_rows: int
    max_model_len: int


@dataclass(frozen=True, eq=False)
class Step:
    """One step's work as index arrays (int32, C-contiguous): several sequences, each with a run of new tokens.

    Sequence s owns rows `query_start[s] : query_start[s+1]`; they are its last tokens, so that after the step it
    is `context_len[s]` long. `block_table[s, i]` is the cache block that holds positions 16·i … 16·i+15.
    `logits_rows` are the rows (ascending) whose logits are wanted; with `greedy`, of each only which is the greatest,
    so that the others may be anything.
    """

    tokens: NDArray[np.int32]  # [tokens]
    positions: NDArray[np.int32]  # [tokens]
    query_start: NDArray[np.int32]  # [seqs + 1]
    context_len: NDArray[np.int32]  # [seqs]
    block_table: NDArray[np.int32]  # [seqs, blocks], padded with 0
    logits_rows: NDArray[np.int32]  # [rows]
    greedy: bool = False


@dataclass(frozen=True, eq=False)
class NormWeight:
    """RMSNorm, or LayerNorm when `kind` is "layer": weight as float32, any offset (Gemma's 1 + w) folded in."""

    weight: Any
    bias: Any | None
    eps: float
    width: int
    kind: Literal["rms", "layer"] = "rms"


@dataclass(frozen=True, eq=False)
class ExpertsWeight:
    """A routed MLP (Shazeer et al. 2017; Mixtral): everything prepared by `prepare_linear`.

    router `[experts, hidden]`; for each expert gate_up `[2·width, hidden]` and down `[hidden, width]`.
    """

    router: Any
    gate_up: tuple[Any, ...]
    down: tuple[Any, ...]


class Ops(Protocol[B]):
    """What the decoder may ask for. See the module's head for what a buffer is."""

    # -- weights, once, at load --------------------------------------------------------------------------
    def prepare_linear(self, parts: Sequence[Tensor], bias: NDArray[np.float32] | None = None) -> Any:
        """Stack matrices `[out_i, in]` along `out` (q, k, v; gate, up) into one weight of this backend's layout."""
        ...

    def prepare_embedding(self, table: Tensor) -> Any:
        """A table `[vocabulary, hidden]` for `embed`. A tied head passes the same object to `logits` as well."""
        ...

    def prepare_norm(
        self,
        weight: NDArray[np.float32],
        eps: float,
        *,
        bias: NDArray[np.float32] | None = None,
        kind: Literal["rms", "layer"] = "rms",
    ) -> NormWeight: ...

    # -- the step ----------------------------------------------------------------------------------------
    def embed(self, table: Any, *, scale: float = 1.0) -> B:
        """Rows of `table` for the step's tokens, times `scale`."""
        ...

    def norm(self, x: B, weight: NormWeight, *, add: B | None = None) -> B:
        """Normalise each row in float32; with `add`, add that buffer to the result (post-norm residuals)."""
        ...

    def linear(self, x: B, weight: Any, *, add: B | None = None, scale: float = 1.0) -> B:
        """`x @ weight.T + bias`, then `add + scale · result` when `add` is given (else `scale · result`)."""
        ...

    def rope_and_cache(
        self,
        qkv: B,
        layer: int,
        attention: Attention,
        *,
        q_norm: NormWeight | None = None,
        k_norm: NormWeight | None = None,
    ) -> B:
        """Turn q and k by position and write k and v into the cache of `layer`.

        qkv is `[tokens, (heads + 2·kv_heads) · head_dim]`. A q/k norm comes first; it is per head when its width
        is head_dim, over all heads when its width is theirs together. Returns the buffer whose first
        heads · head_dim columns are q, ready for `attention`.
        """
        ...

    def attention(self, q: B, layer: int, attention: Attention) -> B:
        """Causal softmax attention of q over the cache of `layer`: `[tokens, heads · head_dim]`."""
        ...

    def gated(self, x: B, activation: Activation) -> B:
        """x is `[gate | up]`, each half `width`: activation(gate) · up."""
        ...

    def activate(self, x: B, activation: Activation) -> B:
        """The plain MLP's activation(x)."""
        ...

    def experts(
        self, x: B, weight: ExpertsWeight, activation: Activation, *, top_k: int, normalise: bool, add: B | None = None
    ) -> B:
        """Σ over each token's `top_k` experts of probability · down(activation(gate) · up), then `add` plus that.

        Probabilities are the float32 softmax of the router's outputs over all experts; ties take the lower index;
        with `normalise` those chosen are divided by their sum. The router's own product is never done with
        quantised activations.
        """
        ...

    def select_rows(self, x: B) -> B:
        """The rows `step.logits_rows` of x; every later buffer has that many rows."""
        ...

    def logits(self, x: B, head: Any, *, scale: float = 1.0, softcap: float | None = None) -> B:
        """`x @ head.T · scale` in float32 `[rows, vocabulary]`, soft-capped when asked.

        head comes from `prepare_embedding` (tied) or `prepare_linear` (its own matrix).
        """
        ...


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache's shape: one entry of `attentions` for each layer."""

    attentions: tuple[Attention, ...] = field(default=())
    type: CacheType = "bf16"


@dataclass(frozen=True)
class OpWork:
    """What an op must do at the least: `bytes` of weights to read, `products` for each row, of tokens or of logits.

    `greedy_bytes` are read where of `FEW_ROWS` rows or fewer no more than the greatest logits are wanted.
    """

    bytes: int = 0
    products: int = 0
    of_logits: bool = False
    greedy_bytes: int = 0


class Executor(Protocol):
    """A loaded model that runs steps: what the engine holds. It owns the weights and the KV cache."""

    vocab_size: int
    weight_bytes: int
    """Bytes of weights that a step with one token must read."""

    greedy_bytes: int
    """The least of these, where of `FEW_ROWS` rows or fewer no more than the greatest logit is wanted."""

    block_bytes: int
    """Bytes of one cache block over all layers."""

    cache_format: str
    """Names everything but the weights that the bytes of a block depend on: executors of the same weights and the
    same `cache_format` may exchange blocks."""

    shape: StepShape

    pool: Any
    """The threads that run its steps, which are free between them; None where they are nobody else's to use."""

    def free_memory(self) -> int:
        """Bytes that are free where the cache will lie."""
        ...

    def allocate_cache(self, blocks: int) -> None:
        """Give the cache `blocks` blocks, all free. Called once before the first run."""
        ...

    def run(self, step: Step) -> NDArray[np.float32]:
        """Run one step; logits `[rows, vocabulary]`, valid until the next run."""
        ...

    runs_on: bool
    """Whether it knows `run_on`."""

    def run_on(self, step: Step, steps: int, ends: Sequence[int]) -> NDArray[np.int32]:
        """Run a greedy step of one token a sequence, and up to `steps` - 1 like it, in each of which every sequence's
        token is the greatest of its logits in the one before, the first of equals.

        Returns these, `[steps that ran, sequences]`; the last step is the first that gave one of `ends`. The block
        table must have room for all steps.
        """
        ...

    def likeliest(self, logits: NDArray[np.float32], rows: Sequence[int]) -> list[int] | None:
        """Of these rows of `logits` the greatest's column, the first of equals, where that was noted on the way.

        None where it was not, and where `logits` is not the very array that the last run returned.
        """
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole cache blocks (source, destination), all layers."""
        ...

    def read_block(self, block: int) -> NDArray[np.uint8]:
        """A copy of a cache block over all layers, `[block_bytes]`."""
        ...

    def write_block(self, block: int, content: NDArray[np.uint8]) -> None:
        """Fill a cache block with what `read_block` gave."""
        ...

    def close(self) -> None:
        """Free threads and memory. The executor cannot be used afterwards."""
        ...


class Backend(Protocol[B]):
    """What `model.build` is given, for every device: ops to prepare weights with, then one executor made of them."""

    @property
    def ops(self) -> Ops[B]: ...

    def record(self, forward: Callable[[Ops[B]], B]) -> Executor:
        """The executor whose steps run `forward`, which returns the logits buffer. Called once, after all weights."""
        ...
