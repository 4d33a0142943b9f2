"""A toy model whose every logit depends on every token before it, read through the block table.

It keeps token ids in the "cache blocks" that a step tells it to, and takes the history of a sequence from them: a block
that was overwritten, not copied or wrongly shared gives other logits, and so other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from miaotui.backends.ops import BLOCK_SIZE, Step, StepShape
from miaotui.engine.admit import EngineConfig
from miaotui.engine.draft import DraftProposer
from miaotui.engine.engine import Engine
from miaotui.engine.ngram import NgramProposer
from miaotui.engine.paging import FilePager
from miaotui.engine.prefix_file import open_prefix_file
from miaotui.engine.request import RequestOutput, Sequence
from miaotui.engine.speculate import SpeculativeConfig, Speculator
from miaotui.model.tokenizer import Tokenizer

VOCAB = 260
"""256 bytes, an end, and three tokens more than the tokenizer has."""
EOS = 256


def history_logits(tokens: Many[int], vocab: int = VOCAB, sharpness: float = 3.0) -> NDArray[np.float32]:
    """Logits after `tokens`: pseudo-random, a pure function of all of them."""
    key = np.uint64(1469598103934665603)
    with np.errstate(over="ignore"):
        for token in tokens:
            key = (key ^ np.uint64(token + 1)) * np.uint64(1099511628211)
            key ^= key >> np.uint64(29)
        words = np.arange(vocab, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
    return ((words >> np.uint64(40)).astype(np.float64) * 2.0**-24 * sharpness).astype(np.float32)


class ToyExecutor:
    """Keeps the contract of `backends.ops.Executor` and checks that the engine keeps its side."""

    weight_bytes = greedy_bytes = 1000
    pool = None
    block_bytes = BLOCK_SIZE * 4
    cache_format = "toy"

    def __init__(self, shape: StepShape, vocab: int = VOCAB, sharpness: float = 3.0, *, runs_on: bool = False) -> None:
        self.shape = shape
        self.vocab_size = vocab
        self._sharpness = sharpness
        self._cache: NDArray[np.int64] = np.zeros((0, BLOCK_SIZE), np.int64)
        self.steps = 0
        self.tokens_run = 0
        self.copies = 0
        self.closed = False
        self.runs_on = runs_on
        self._greatest: list[int] | None = None

    def free_memory(self) -> int:
        return 1 << 30

    def allocate_cache(self, blocks: int) -> None:
        assert len(self._cache) == 0
        self._cache = np.full((blocks, BLOCK_SIZE), -1, np.int64)

    def run(self, step: Step) -> NDArray[np.float32]:
        self.steps += 1
        self.tokens_run += len(step.tokens)
        self._check(step)
        wanted = set(step.logits_rows.tolist())
        logits = []
        for s, context in enumerate(step.context_len):
            start, end = int(step.query_start[s]), int(step.query_start[s + 1])
            for row in range(start, end):
                position = int(step.positions[row])
                self._cache[step.block_table[s, position // BLOCK_SIZE], position % BLOCK_SIZE] = step.tokens[row]
            history = self._cache[step.block_table[s]].reshape(-1)
            for row in range(start, end):
                if row in wanted:
                    position = int(context) - (end - row)
                    logits.append(history_logits(history[: position + 1].tolist(), self.vocab_size, self._sharpness))
        return self._answer(step, np.array(logits, np.float32).reshape(len(logits), self.vocab_size))

    def run_on(self, step: Step, steps: int, ends: Many[int]) -> NDArray[np.int32]:
        """Each step as the engine would have it run alone, with no more of the table than it needs."""
        table = step.block_table
        held = -(-(step.context_len + steps - 1) // BLOCK_SIZE)
        assert all((table[s, blocks:] == 0).all() for s, blocks in enumerate(held)), "the table holds too much"
        assert step.greedy
        assert len(step.tokens) == len(step.context_len) == len(step.logits_rows)
        chosen: list[list[int]] = []
        for _ in range(steps):
            needed = -(-step.context_len // BLOCK_SIZE)
            step = replace(step, block_table=np.where(np.arange(table.shape[1]) < needed[:, None], table, 0))
            self.run(step)
            assert self._greatest is not None
            chosen.append(self._greatest)
            if not set(ends).isdisjoint(chosen[-1]):
                break
            tokens = np.array(chosen[-1], np.int32)
            step = replace(step, tokens=tokens, positions=step.positions + 1, context_len=step.context_len + 1)
        return np.array(chosen, np.int32)

    def _answer(self, step: Step, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A greedy step's logits are good for nothing; only the greatest is told."""
        self._greatest = logits.argmax(axis=1).tolist() if step.greedy else None
        return np.full_like(logits, np.nan) if step.greedy else logits

    def likeliest(self, logits: NDArray[np.float32], rows: Many[int]) -> list[int] | None:
        return None if self._greatest is None else [self._greatest[row] for row in rows]

    def copy_blocks(self, pairs: Many[tuple[int, int]]) -> None:
        for source, target in pairs:
            self._cache[target] = self._cache[source]
            self.copies += 1

    def read_block(self, block: int) -> NDArray[np.uint8]:
        return self._cache[block].astype(np.int32).view(np.uint8)

    def write_block(self, block: int, content: NDArray[np.uint8]) -> None:
        self._cache[block] = content.view(np.int32)

    def close(self) -> None:
        self.closed = True

    def _check(self, step: Step) -> None:
        arrays = [value for name, value in vars(step).items() if name != "greedy"]
        assert all(a.dtype == np.int32 and a.flags.c_contiguous for a in arrays)
        assert 0 < len(step.tokens) == len(step.positions) == step.query_start[-1] <= self.shape.max_tokens
        assert 0 < len(step.context_len) == len(step.query_start) - 1 <= self.shape.max_seqs
        assert len(step.logits_rows) <= self.shape.max_logits_rows
        assert (np.diff(step.logits_rows) > 0).all()
        assert (np.diff(step.query_start) > 0).all()
        writes = []
        for s, context in enumerate(step.context_len):
            start, end = step.query_start[s], step.query_start[s + 1]
            assert context <= self.shape.max_model_len
            assert (step.positions[start:end] == np.arange(context - (end - start), context)).all()
            blocks = -(-int(context) // BLOCK_SIZE)
            assert (step.block_table[s, blocks:] == 0).all(), "the table is not padded with 0"
            writes += [
                int(step.block_table[s, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
                for p in step.positions[start:end].tolist()
            ]
        assert len(set(writes)) == len(writes), "two tokens are written to one place"


def toy_tokenizer() -> Tokenizer:
    """Bytes, and `<end>`, a special token."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"})


def toy_engine(
    *,
    blocks: int = 256,
    max_model_len: int = 512,
    seqs: int = 64,
    budget: int = 512,
    rows: int | None = None,
    prefix: bool = True,
    eos: tuple[int, ...] = (),
    vocab: int = VOCAB,
    sharpness: float = 3.0,
    file: Path | None = None,
    slots: int = 0,
    speculator: Speculator | None = None,
    runs_on: bool = True,
) -> Engine:
    """`file` pages idle prefixes to that file, with so many slots."""
    shape = StepShape(max_tokens=budget, max_seqs=seqs, max_logits_rows=rows or seqs, max_model_len=max_model_len)
    config = EngineConfig(
        blocks=blocks,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix,
        eos_token_ids=eos,
    )
    executor = ToyExecutor(shape, vocab, sharpness, runs_on=runs_on)
    pager = None
    if file is not None:
        found = open_prefix_file(file, 4096 + slots * (executor.block_bytes + 32), executor.block_bytes, bytes(32))
        pager = None if found is None else FilePager(executor, found)
    return Engine(executor, toy_tokenizer(), config, pager, speculator)


class EagerSpeculator(Speculator):
    """Takes every offer in full, whatever it costs."""

    def _lengths(self, tokens: float, rows: int, offers: dict[Sequence, int]) -> dict[Sequence, int]:
        return offers


def eager(count: int = 5, draft: ToyExecutor | None = None, blocks: int = 256, vocab: int = VOCAB) -> EagerSpeculator:
    """Guesses by look-up, or by a draft model."""
    proposer = NgramProposer(2, 8) if draft is None else DraftProposer(draft, blocks, vocab)
    return EagerSpeculator(proposer, SpeculativeConfig(count))


class Scatterbrain(ToyExecutor):
    """A draft model that is right two times of three."""

    def _answer(self, step: Step, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        for row, at in enumerate(step.logits_rows):
            if (int(step.positions[at]) + int(step.tokens[at])) % 3 == 0:
                logits[row] = logits[row][::-1]
        return super()._answer(step, logits)


def finish(engine: Engine, *, check: bool = True) -> dict[str, RequestOutput]:
    """Step until nothing is left; the finished outputs by request."""
    done: dict[str, RequestOutput] = {}
    for _ in range(100_000):
        if not engine.has_work:
            return done
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        if check:
            engine.check_integrity()
    raise AssertionError("the engine makes no progress")


def naive_greedy(prompt: Many[int], count: int, vocab: int = VOCAB, sharpness: float = 3.0) -> list[int]:
    """What greedy decoding must give: the whole history, every time."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(history_logits(tokens, vocab, sharpness).argmax()))
    return tokens[len(prompt) :]
