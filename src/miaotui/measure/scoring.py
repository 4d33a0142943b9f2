"""A model's logits over windows of tokens, a few rows at a time, and what they say: log-probabilities and divergence.

It is the executor that serves which runs here, with its paged cache and its chunked prefill. Memory beside the model:
one chunk of logits, at most `LOGITS_BYTES`, and two float64 rows for each thread; never a window by the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.ops import BLOCK_SIZE, Executor, Step
from miaotui.checkpoint import Checkpoint, open_checkpoint, resolve
from miaotui.errors import CheckpointError, MiaotuiError, ResourceError, UsageError
from miaotui.hardware import detect
from miaotui.measure.quality_data import Ids, Messages, Window
from miaotui.model.build import build
from miaotui.model.families import read_spec
from miaotui.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from miaotui.model.chat import ChatTemplate

Logits = NDArray[np.float32]
Values = NDArray[np.float64]

LOGITS_BYTES = 64 << 20
MOST_ROWS, LEAST_ROWS = 512, 16
GREEDY_SEQS = 8
"""Prompts that are continued side by side."""


@dataclass(frozen=True)
class Settings:
    """How a model is run; the words are those of `LLM`."""

    device: str = "auto"
    compute: str = "auto"
    kv_cache_dtype: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class Opened:
    """A model of which only the headers and the tokenizer have been read."""

    model: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @classmethod
    def of(cls, model: str) -> Opened:
        """Raises ModelNotFoundError and CheckpointError as `model.build.load` does."""
        checkpoint = open_checkpoint(resolve(model))
        return cls(model, checkpoint, Tokenizer.from_checkpoint(checkpoint))

    def render(self, messages: Messages) -> list[int]:
        """The tokens of a whole conversation. Raises RequestError where the model has no chat template."""
        return self._template.encode(messages, add_generation_prompt=False)

    @cached_property
    def _template(self) -> ChatTemplate:
        from miaotui.model.chat import ChatTemplate

        return ChatTemplate.from_checkpoint(self.checkpoint, self.tokenizer)

    def load(self, settings: Settings, window: int, slots: int = GREEDY_SEQS) -> Scorer:
        """Ready to score windows of up to `window` tokens, with `slots` prompts side by side.

        Raises what `model.build.build` does, and ResourceError.
        """
        spec, _ = read_spec(self.checkpoint)
        if window > spec.max_position:
            raise UsageError(
                f"A window of {window} tokens is longer than {self.model} reaches ({spec.max_position}).",
                f"Give --window at most {spec.max_position}.",
            )
        rows = rows_for(spec.vocab_size, window)
        _, executor = build(
            self.checkpoint,
            device=settings.device,
            compute=settings.compute,
            kv_cache_dtype=settings.kv_cache_dtype,
            max_model_len=window,
            max_num_seqs=min(slots, rows),
            max_num_batched_tokens=rows,
            max_logits_rows=rows,
            threads=settings.threads,
            greedy_screen=False,
        )
        return Scorer(self.model, executor)


def rows_for(vocab_size: int, window: int) -> int:
    """Rows of a chunk: as few chunks as the bounds allow, all of about the same size."""
    most = min(MOST_ROWS, max(LEAST_ROWS, LOGITS_BYTES // (4 * vocab_size)))
    chunks = -(-(window - 1) // most)
    return max(1, -(-(window - 1) // chunks))


class Scorer:
    """Owns an executor and its cache, in which every slot has its own blocks for a sequence of full length."""

    def __init__(self, model: str, executor: Executor) -> None:
        self.model = model
        self.executor = executor
        self._held: Ids = np.empty(0, np.int32)
        """Tokens whose keys and values the first slot has."""
        shape = executor.shape
        self.slots = shape.max_seqs
        each = -(-shape.max_model_len // BLOCK_SIZE)
        self._table = np.arange(self.slots * each, dtype=np.int32).reshape(self.slots, each)
        needed, free = self._table.size * executor.block_bytes, detect.available_memory()
        if needed > free:
            executor.close()
            raise ResourceError(
                f"The KV cache of {self.slots} windows takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free.",
                "Give a smaller --window, or --kv-cache-dtype int8.",
            )
        executor.allocate_cache(self._table.size)

    def logits(self, window: Window, *, again: bool = False) -> Iterator[Logits]:
        """Rows for the window's targets in their order, `[rows, vocabulary]`; each chunk is valid until the next.

        `again`: what the last window began with, too, is still in the cache, and is not read twice.
        """
        self._check(window.tokens)
        end, size = len(window.tokens) - 1, self.executor.shape.max_tokens
        known = min(_shared(self._held, window.tokens), window.first - 1) if again else 0
        self._held = window.tokens[:0]
        for start in range(known, end, size):
            stop = min(start + size, end)
            wanted = np.arange(max(start, window.first - 1), stop, dtype=np.int32) - np.int32(start)
            logits = self.executor.run(self._step([(0, start, window.tokens[start:stop])], wanted))
            self._held = window.tokens[:stop]
            if len(wanted):
                yield logits

    def greedy(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """`count` greedy tokens after each prompt, whatever they are: an end of text does not end them."""
        answers: list[Ids] = []
        self._held = self._held[:0]
        for first in range(0, len(prompts), self.slots):
            batch = prompts[first : first + self.slots]
            answers += list(self._greedy_batch(batch, count))
        return answers

    def close(self) -> None:
        """Free the model."""
        self.executor.close()

    def _greedy_batch(self, prompts: Sequence[Ids], count: int) -> NDArray[np.int32]:
        """`[prompts, count]`."""
        answers = np.zeros((len(prompts), count), np.int32)
        for slot, prompt in enumerate(prompts):
            answers[slot, 0] = self._prefill(slot, prompt).argmax()
        every = np.arange(len(prompts), dtype=np.int32)
        for at in range(1, count):
            runs = [(slot, len(prompt) + at - 1, answers[slot, at - 1 : at]) for slot, prompt in enumerate(prompts)]
            answers[:, at] = self.executor.run(self._step(runs, every)).argmax(axis=1)
        return answers

    def _prefill(self, slot: int, prompt: Ids) -> Logits:
        """The logits after the prompt, `[vocabulary]`."""
        self._check(prompt)
        size = self.executor.shape.max_tokens
        for start in range(0, len(prompt), size):
            part = prompt[start : start + size]
            logits = self.executor.run(self._step([(slot, start, part)], np.array([len(part) - 1], np.int32)))
        row: Logits = logits[0]
        return row

    def _step(self, runs: Sequence[tuple[int, int, Ids]], rows: Ids) -> Step:
        """A step of (slot, position of the first token, tokens) runs."""
        ends = np.array([start + len(tokens) for _, start, tokens in runs], np.int32)
        table = self._table[[slot for slot, _, _ in runs]]
        table[np.arange(table.shape[1]) * BLOCK_SIZE >= ends[:, None]] = 0
        return Step(
            tokens=np.concatenate([tokens for _, _, tokens in runs]),
            positions=np.concatenate([np.arange(at, at + len(new), dtype=np.int32) for _, at, new in runs]),
            query_start=np.cumsum([0, *(len(tokens) for _, _, tokens in runs)], dtype=np.int32),
            context_len=ends,
            block_table=table,
            logits_rows=rows,
        )

    def _check(self, tokens: Ids) -> None:
        if len(tokens) and tokens.max() >= self.executor.vocab_size:
            raise CheckpointError(
                f"The tokenizer gives token {tokens.max()}, and {self.model} has {self.executor.vocab_size}.",
                "Use the tokenizer that belongs to the model.",
            )


def _shared(first: Ids, second: Ids) -> int:
    """How many tokens two runs begin with alike."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


# -- what the rows say -----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Divergence:
    """For each target: -log p of the reference and of the model, KL(reference ‖ model), and whether the likeliest
    token is another."""

    reference_nll: Values
    nll: Values
    kl: Values
    flipped: Values


class Speaker(Protocol):
    """What gives logits: a Scorer, or a recording of one."""

    @property
    def model(self) -> str: ...

    def logits(self, window: Window) -> Iterator[Logits]:
        """Rows for the window's targets in their order, `[rows, vocabulary]`; each chunk is valid until the next."""
        ...


class Listening:
    """A scorer, and which tokens it found likeliest. What the last window began with is not read twice."""

    def __init__(self, scorer: Scorer) -> None:
        self.model, self._scorer = scorer.model, scorer
        self._chosen: list[Ids] = []

    def logits(self, window: Window) -> Iterator[Logits]:
        """As the scorer's."""
        self._chosen.clear()
        for chunk in self._scorer.logits(window, again=True):
            self._chosen.append(chunk.argmax(axis=1).astype(np.int32))
            yield chunk

    @property
    def likeliest(self) -> Ids:
        """For each target of the last window."""
        return np.concatenate(self._chosen)


class Rows:
    """Reads rows of logits on `threads` threads (numpy lets go of the GIL), in float64, row by row: a row and its
    temporaries stay in the cache. Close it, or use it in a `with`."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or detect.usable_cores()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="rows")

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def nll(self, scorer: Speaker, window: Window) -> Values:
        """-log p of each of the window's targets, natural logarithm."""
        found, at = np.empty(len(window.targets)), 0
        for logits in scorer.logits(window):
            targets, out = window.targets[at : at + len(logits)], found[at : at + len(logits)]
            self._split(_nll, logits, targets, out)
            at += len(logits)
        return _finite(found, scorer.model)

    def divergence(self, reference: Speaker, scorer: Speaker, window: Window) -> Divergence:
        """How the model differs from the reference on the same tokens; their vocabularies must be the same."""
        found, at = np.empty((len(window.targets), 4)), 0
        for original, logits in zip(reference.logits(window), scorer.logits(window), strict=True):
            targets, out = window.targets[at : at + len(logits)], found[at : at + len(logits)]
            self._split(_diverge, original, logits, targets, out)
            at += len(logits)
        _finite(found[:, 0], reference.model)
        return Divergence(*_finite(found, scorer.model).T)

    def _split(self, work: Callable[..., None], *arrays: NDArray[Any]) -> None:
        """`work` on all rows of the arrays, a strip for each thread."""
        strip = -(-len(arrays[0]) // self._threads)
        starts = range(0, len(arrays[0]), strip)
        list(self._pool.map(work, *([array[start : start + strip] for start in starts] for array in arrays)))


def _nll(logits: Logits, targets: Ids, out: Values) -> None:
    exponentials = np.empty(logits.shape[1])
    for i, row in enumerate(logits):
        out[i] = _log_total(row, exponentials)[0] - float(row[targets[i]])


def _diverge(original: Logits, logits: Logits, targets: Ids, out: Values) -> None:
    """Fill out `[rows, 4]` in the order of Divergence's fields.

    With p = softmax(x) and q = softmax(y): Σ p (log p - log q) = Σ p (x - y) - (log Σ eˣ - log Σ eʸ).
    """
    weights, buffer = np.empty(logits.shape[1]), np.empty(logits.shape[1])
    for i, (x, y, target) in enumerate(zip(original, logits, targets, strict=True)):
        log_x, total = _log_total(x, weights)
        np.subtract(x, y, out=buffer, dtype=np.float64)
        np.multiply(buffer, weights, out=buffer)
        shift = float(buffer.sum()) / total
        log_y, _ = _log_total(y, buffer)
        kl = max(0.0, shift - (log_x - log_y))  # below 0 by rounding only
        out[i] = log_x - float(x[target]), log_y - float(y[target]), kl, x.argmax() != y.argmax()


def _log_total(row: Logits, exponentials: Values) -> tuple[float, float]:
    """log Σ e^row; and Σ of `exponentials`, which become e^(row - its largest)."""
    largest = float(row.max())
    np.subtract(row, largest, out=exponentials, dtype=np.float64)
    np.exp(exponentials, out=exponentials)
    total = float(exponentials.sum())
    return largest + float(np.log(total)), total


def _finite(values: Values, model: str) -> Values:
    if not np.isfinite(values).all():
        raise MiaotuiError(
            f"{model} gives logits that are not finite numbers.",
            "Its weights are damaged, or too coarse: look at it with --compute fp32.",
        )
    return values
