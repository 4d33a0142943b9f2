"""From LLM's settings to a model with its engine: what is loaded, what memory goes where, who guesses, who pages."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaotui.backends.ops import Executor
from miaotui.engine.admit import EngineConfig
from miaotui.engine.draft import DraftProposer, check_same_tokens
from miaotui.engine.engine import Engine
from miaotui.engine.memory import fit_cache
from miaotui.engine.ngram import NgramProposer
from miaotui.engine.paging import FilePager, open_pager
from miaotui.engine.speculate import Proposer, SpeculativeConfig, Speculator
from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.model.build import LoadedModel

_LEAST_ROWS = 64
"""Rows of logits in a step at least, so that scoring a text takes few steps."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """LLM's arguments; see there. Raises UsageError for a bound below 1."""

    compute: str
    kv_cache_dtype: str
    kv_cache_memory_bytes: int | None
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    prefix_cache_file: str | Path | None
    prefix_cache_bytes: int
    speculative: str | Mapping[str, Any] | None
    threads: int | None
    device: str
    keep_packed: bool
    greedy_screen: bool

    def __post_init__(self) -> None:
        for name in ("kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}.", "Give at least 1.")
        if self.prefix_cache_file is not None and not self.enable_prefix_caching:
            raise UsageError("prefix_cache_file needs prefix caching, which is off.", "Leave one of the two out.")

    @property
    def shared(self) -> dict[str, Any]:
        """What a draft model is loaded with too."""
        names = (
            "device",
            "compute",
            "kv_cache_dtype",
            "max_num_seqs",
            "max_num_batched_tokens",
            "threads",
            "keep_packed",
            "greedy_screen",
        )
        return {name: getattr(self, name) for name in names}


def assemble(model: str, settings: Settings) -> tuple[LoadedModel, Engine]:
    """Load `model`, and the draft model if there is one, and put an engine around it."""
    from miaotui.model.build import load

    guesses = SpeculativeConfig.parse(settings.speculative)
    with ExitStack() as unfinished:
        rows = None if guesses is None else _rows(settings, guesses)
        loaded = load(model, **settings.shared, max_model_len=settings.max_model_len, max_logits_rows=rows)
        unfinished.callback(loaded.executor.close)
        draft = None
        if guesses is not None and guesses.model is not None:
            draft = load(guesses.model, **settings.shared, beside=loaded.executor)
            unfinished.callback(draft.executor.close)
            check_same_tokens(draft.tokenizer, loaded.tokenizer, guesses.model)
        config = _config(settings, loaded, None if draft is None else draft.executor)
        pager = _pager(settings, loaded)
        if pager is not None:
            unfinished.callback(pager.file.close)
        speculator = None
        if guesses is not None:
            proposer: Proposer = NgramProposer(guesses.prompt_lookup_min, guesses.prompt_lookup_max)
            if draft is not None:
                proposer = DraftProposer(draft.executor, config.blocks, loaded.executor.vocab_size)
            speculator = Speculator(proposer, guesses)
        engine = Engine(loaded.executor, loaded.tokenizer, config, pager, speculator)
        unfinished.pop_all()
    return loaded, engine


def _rows(settings: Settings, guesses: SpeculativeConfig) -> int:
    """Rows of logits with all that may be guessed. Those that are not asked for take no memory."""
    most = settings.max_num_seqs * (1 + guesses.num_speculative_tokens)
    return min(max(most, _LEAST_ROWS), settings.max_num_batched_tokens)


def _config(settings: Settings, loaded: LoadedModel, draft: Executor | None) -> EngineConfig:
    executor, wanted = loaded.executor, settings.kv_cache_memory_bytes
    longest, free = executor.shape.max_model_len, executor.free_memory()
    fit = fit_cache(executor, free, longest, settings.max_num_seqs, wanted, draft)
    return EngineConfig(
        blocks=fit.blocks,
        max_model_len=fit.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enable_prefix_caching=settings.enable_prefix_caching,
        eos_token_ids=tuple(dict.fromkeys((*loaded.tokenizer.eos_ids, *loaded.spec.eos_token_ids))),
    )


def _pager(settings: Settings, loaded: LoadedModel) -> FilePager | None:
    if settings.prefix_cache_file is None:
        return None
    fingerprint = loaded.checkpoint.fingerprint()
    return open_pager(
        settings.prefix_cache_file, settings.prefix_cache_bytes, loaded.executor, fingerprint, loaded.spec
    )
