"""What is refused at the door, with the numbers: prompts and parameters that could never be served."""

from __future__ import annotations

from dataclasses import dataclass

from miaotui.backends.ops import BLOCK_SIZE
from miaotui.engine.blocks import blocks_for
from miaotui.engine.params import BeamSearchParams, SamplingParams
from miaotui.errors import RequestError


@dataclass(frozen=True)
class EngineConfig:
    """The engine's bounds. `blocks` of the KV cache; the others as in `LLM`."""

    blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    eos_token_ids: tuple[int, ...] = ()


def check_prompt(ids: list[int], vocab_size: int) -> None:
    """Raise RequestError for a prompt without tokens, or with one that the model does not have."""
    if not ids:
        raise RequestError("The prompt is empty.", "Give at least one token.", param="prompt")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise RequestError(
            f"The prompt holds token {low if low < 0 else high}, but the vocabulary has {vocab_size} tokens.",
            f"Use ids from 0 to {vocab_size - 1}.",
            param="prompt",
        )


def tokens_allowed(prompt_len: int, params: SamplingParams | BeamSearchParams, config: EngineConfig) -> int:
    """New tokens that the request may have: what it asks for, or all that fits when it names no number.

    Raises RequestError when that can never fit. The last new token is never run, so it takes no place in the cache.
    """
    context = min(config.max_model_len, config.blocks * BLOCK_SIZE + 1)
    wanted = params.max_tokens
    if prompt_len + (wanted or 1) > context:
        asked = f"{prompt_len} prompt tokens and {wanted} new ones" if wanted else f"{prompt_len} prompt tokens"
        raise RequestError(
            f"The request needs {prompt_len + (wanted or 1)} positions ({asked}), but the context holds {context}.",
            "Shorten the prompt, lower max_tokens, or raise max_model_len.",
            param="max_tokens" if prompt_len < context else "prompt",
        )
    if isinstance(params, BeamSearchParams):
        _check_beams(prompt_len + params.max_tokens, params.beam_width, config)
    return wanted or context - prompt_len


def _check_beams(positions: int, width: int, config: EngineConfig) -> None:
    """All beams of a search must fit together, for they wait for each other."""
    needed = width * blocks_for(positions)
    if width > config.max_num_seqs:
        raise RequestError(
            f"{width} beams are more than the {config.max_num_seqs} sequences that may run together.",
            "Lower beam_width or raise max_num_seqs.",
            param="beam_width",
        )
    if needed > config.blocks:
        raise RequestError(
            f"{width} beams of {positions} positions need {needed} cache blocks of {BLOCK_SIZE}, of {config.blocks}.",
            "Lower beam_width or max_tokens, or shorten the prompt.",
            param="beam_width",
        )
