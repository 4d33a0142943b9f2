"""What a step must do at the least: bytes to read and operations to compute, and so the least time it can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from miaotui.backends.ops import BLOCK_SIZE, FEW_ROWS
from miaotui.hardware.ceilings import Ceilings
from miaotui.model.spec import LayerSpec, ModelSpec


@dataclass(frozen=True)
class Work:
    """The least that one step does. A multiply-add is two operations."""

    bytes: float
    linear_operations: float
    attention_operations: float
    head_operations: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a model costs, from its shapes: `weight_bytes` a step reads, `cache_bytes` for a position over all layers.

    `integer` says that the matrix products run on integer codes, `integer_head` the same of the head alone; None: that
    they are as the others. `greedy_bytes` are read instead in steps of `FEW_ROWS` rows of logits or fewer of which only
    the greatest are wanted; None: as many.
    """

    spec: ModelSpec
    weight_bytes: int
    cache_bytes: float
    integer: bool
    integer_head: bool | None = None
    greedy_bytes: int | None = None

    @classmethod
    def of(
        cls, spec: ModelSpec, weight_bytes: int, block_bytes: int, compute: str, greedy_bytes: int | None = None
    ) -> Cost:
        """The bytes as an executor states them; `compute` is `auto` or `fp32`."""
        codes = weight_bytes / parameters_read(spec) < 1.5  # bf16 has 2 bytes, int8 with its scales less than 1.2
        integer = codes and compute != "fp32"
        return cls(spec, weight_bytes, block_bytes / BLOCK_SIZE, integer, greedy_bytes=greedy_bytes)

    def step(self, contexts: Sequence[int], new_tokens: int = 1) -> Work:
        """Every sequence gets `new_tokens` tokens and then has its length in `contexts`; one greedy logits row each.

        Of the last layer the other tokens need their keys and values alone.
        """
        rows, tokens = len(contexts), new_tokens * len(contexts)
        *before, last = self.spec.layers
        most = _layer_parameters(self.spec, last)
        least = 2 * self.spec.hidden_size * last.attention.kv_heads * last.attention.head_dim
        products = tokens * sum(_layer_parameters(self.spec, layer) for layer in before)
        linear = 2.0 * (products + rows * most + (tokens - rows) * least)
        head = 2.0 * rows * self.spec.vocab_size * self.spec.hidden_size
        seen = sum(self._positions_seen(layer, context, new_tokens) for layer in before for context in contexts)
        seen += sum(self._positions_seen(last, context, 1) for context in contexts)
        cached = self.cache_bytes * sum(self._cache_read(context, new_tokens) for context in contexts)
        return Work(self.read(rows) + cached, linear, seen, head)

    def read(self, rows: int) -> int:
        """Bytes of weights that a greedy step with so many rows of logits reads."""
        return self.weight_bytes if self.greedy_bytes is None or rows > FEW_ROWS else self.greedy_bytes

    def seconds(self, work: Work, ceilings: Ceilings) -> float:
        """The least time for it: reading and computing may overlap perfectly, linear and attention may not."""
        head = self.integer if self.integer_head is None else self.integer_head
        compute = work.linear_operations / (ceilings.int8 if self.integer else ceilings.fp32)
        compute += work.head_operations / (ceilings.int8 if head else ceilings.fp32)
        compute += work.attention_operations / ceilings.fp32
        return max(work.bytes / ceilings.bandwidth, compute)

    def _positions_seen(self, layer: LayerSpec, context: int, new_tokens: int) -> float:
        """Operations of one layer's attention: 2 for q·k and 2 for p·v, for each element of each visible position."""
        attention = layer.attention
        visible = sum(_visible(layer, position + 1) for position in range(context - new_tokens, context))
        return 4.0 * attention.heads * attention.head_dim * visible

    def _cache_read(self, context: int, new_tokens: int) -> float:
        """Cached positions that must be read, averaged over layers by their width."""
        widths = [layer.attention.kv_heads * layer.attention.head_dim for layer in self.spec.layers]
        spans = [_visible(layer, context - new_tokens) for layer in self.spec.layers]
        return sum(width * span for width, span in zip(widths, spans, strict=True)) / sum(widths)


def _visible(layer: LayerSpec, context: int) -> int:
    """How many of `context` positions a layer attends to."""
    window = layer.attention.window
    return context if window is None else min(context, window)


def parameters_read(spec: ModelSpec) -> int:
    """Weights that a step with one token multiplies by: the layers' matrices (chosen experts only) and the head."""
    return sum(_layer_parameters(spec, layer) for layer in spec.layers) + spec.vocab_size * spec.hidden_size


def parameters(spec: ModelSpec) -> int:
    """All weights of matrices and tables; norms and biases, a thousandth of them, are not counted."""
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied_head else 2)
    return sum(_layer_parameters(spec, layer, every_expert=True) for layer in spec.layers) + tables


def _layer_parameters(spec: ModelSpec, layer: LayerSpec, every_expert: bool = False) -> int:
    attention = layer.attention
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    matrices = 3 if spec.gated_mlp else 2
    experts = layer.experts
    if experts is None:
        mlp = matrices * spec.hidden_size * spec.intermediate_size
    else:
        used = experts.count if every_expert else experts.top_k
        mlp = used * matrices * spec.hidden_size * experts.width + experts.count * spec.hidden_size
    return spec.hidden_size * (2 * queries + 2 * keys) + mlp
