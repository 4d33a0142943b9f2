"""What an engine has done and holds, in figures."""

from __future__ import annotations

from dataclasses import dataclass

from miaotui.engine.request import FinishReason


@dataclass(frozen=True)
class EngineStats:
    """A moment's picture of the engine. Counts are since its beginning; prefix figures are in tokens."""

    running: int
    waiting: int
    blocks: int
    blocks_in_use: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    blocks_paged_out: int
    """Blocks written to the prefix cache file."""
    blocks_paged_in: int
    drafts: int
    """Guesses of speculation, each of one token or more."""
    tokens_drafted: int
    """Tokens that speculation proposed, and how many of them came true."""
    drafts_accepted: int
    accepted_by_position: tuple[int, ...]
    """Of `drafts_accepted`, how many were a guess's first token, its second, …; empty without speculation."""
    steps: int
    step_tokens: int
    """Tokens that went through the model: prompts without what the prefix cache had, answers, guesses, recomputed."""
    prompt_tokens: int
    """Of the requests that have begun to run, cached ones included."""
    generated_tokens: int
    finished: dict[FinishReason, int]

    @property
    def kv_usage(self) -> float:
        """Share of the cache that is held, 0 to 1."""
        return self.blocks_in_use / self.blocks
