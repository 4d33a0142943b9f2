"""How much KV cache this machine can give, and the context that fits in it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from miaotui.backends.ops import BLOCK_SIZE, Executor
from miaotui.engine.blocks import blocks_for
from miaotui.errors import ResourceError

SHARE = 0.4
"""Of the free memory, at most this much becomes KV cache; pages are only taken as blocks come into use."""
LEAST_CONTEXT = 256
"""Positions below which a context is of no use (or the model's own, where that is shorter)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheFit:
    """What fits: blocks of the cache, and the longest context."""

    blocks: int
    max_model_len: int


def fit_cache(executor: Executor, free_bytes: int, max_model_len: int, max_num_seqs: int) -> CacheFit:
    """Blocks for `max_num_seqs` full contexts, or as many as `SHARE` of the free memory holds.

    When not even one full context fits, the context is shortened to what does, and that is logged.
    Raises ResourceError when less than a useful context fits.
    """
    affordable = int(free_bytes * SHARE) // executor.block_bytes
    whole = blocks_for(max_model_len)
    if affordable >= whole:
        return CacheFit(min(affordable, whole * max_num_seqs), max_model_len)
    context = affordable * BLOCK_SIZE
    if context < min(LEAST_CONTEXT, max_model_len):
        needed = blocks_for(min(LEAST_CONTEXT, max_model_len)) * executor.block_bytes / SHARE
        raise ResourceError(
            f"The KV cache has room for {context} positions: {free_bytes / 1e6:.0f} MB of memory are free, and"
            f" {needed / 1e6:.0f} MB are needed for a context of {min(LEAST_CONTEXT, max_model_len)}.",
            "Free memory, take a smaller model, or set kv_cache_dtype to bf16 or int8.",
        )
    _log.warning(
        "max_model_len is %d instead of %d: %.0f MB of memory are free and a position takes %.1f kB of KV cache.",
        context,
        max_model_len,
        free_bytes / 1e6,
        executor.block_bytes / BLOCK_SIZE / 1e3,
    )
    return CacheFit(affordable, context)
