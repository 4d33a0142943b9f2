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


def fit_cache(
    executor: Executor,
    free_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    cache_bytes: int | None = None,
    draft: Executor | None = None,
) -> CacheFit:
    """As many blocks as fit in `cache_bytes`; None: for `max_num_seqs` full contexts, or a `SHARE` of what is free.

    A draft model has as many blocks; its share is counted. When not even one full context fits, the context is
    shortened to what does, and that is logged.
    Raises ResourceError when less than a useful context fits, or more is asked for than is free.
    """
    if cache_bytes is not None and cache_bytes > free_bytes:
        raise ResourceError(
            f"The KV cache is to have {cache_bytes / 1e6:.0f} MB, but {free_bytes / 1e6:.0f} MB of memory are free.",
            "Lower kv_cache_memory_bytes, or leave it out for what fits.",
        )
    share = SHARE if cache_bytes is None else 1.0
    bytes_ = free_bytes if cache_bytes is None else cache_bytes
    block_bytes = executor.block_bytes + (0 if draft is None else draft.block_bytes)
    affordable = int(bytes_ * share) // block_bytes
    whole = blocks_for(max_model_len)
    if affordable >= whole:
        return CacheFit(affordable if cache_bytes is not None else min(affordable, whole * max_num_seqs), max_model_len)
    context = affordable * BLOCK_SIZE
    given = f"{bytes_ / 1e6:.0f} MB " + ("of memory are free" if cache_bytes is None else "are given to it")
    least = min(LEAST_CONTEXT, max_model_len)
    if context < least:
        needed = blocks_for(least) * block_bytes / share
        raise ResourceError(
            f"The KV cache has room for {context} positions: {given}, and {needed / 1e6:.0f} MB are needed for a"
            f" context of {least}.",
            "Free memory, take a smaller model, or set kv_cache_dtype to bf16 or int8."
            if cache_bytes is None
            else "Raise kv_cache_memory_bytes.",
        )
    _log.warning(
        "max_model_len is %d instead of %d: %s and a position takes %.1f kB of KV cache.",
        context,
        max_model_len,
        given,
        block_bytes / BLOCK_SIZE / 1e3,
    )
    return CacheFit(affordable, context)
