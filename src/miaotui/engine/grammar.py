"""Answers that must be in a language: a JSON schema, a regular expression, a Lark grammar, a choice (llguidance).

The mask of allowed tokens is built by one worker thread, from the moment a token is chosen: while the step that runs
that token is computed, natively and without Python's lock, the mask for the next one is built beside it.
"""

from __future__ import annotations

import json
import threading
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from miaotui.engine.params import StructuredOutputs
from miaotui.errors import RequestError, UnsupportedModelError
from miaotui.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Row = NDArray[np.float32]


class GrammarMask:
    """One sequence's place in its language. `advance` with every token; `apply` forbids what may not come next."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, worker: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._words = np.zeros(-(-vocab_size // 32), np.int32)
        self._worker = worker
        self._mask: Future[NDArray[np.bool_]] = worker.submit(self._build, None)

    def advance(self, token: int) -> None:
        """Begin to build the mask of what may follow `token`."""
        self._mask = self._worker.submit(self._build, token)

    def fork(self) -> GrammarMask:
        """Another sequence at the same place."""
        self._mask.result()
        return GrammarMask(self._matcher.deep_copy(), len(self._words) * 32, self._worker)

    def apply(self, row: Row, tokens: array[int]) -> None:
        """A processor (processors.py): -inf for every token that the language does not allow here."""
        row[self._mask.result()[: len(row)]] = -np.inf

    def _build(self, token: int | None) -> NDArray[np.bool_]:
        """Forbidden tokens, [vocabulary]. A language that has ended forbids all: the sequence ends."""
        import llguidance.numpy as masks

        if token is not None:
            self._matcher.consume_token(token)
        if self._matcher.is_stopped() or self._matcher.is_error():
            return np.ones(len(self._words) * 32, bool)
        masks.fill_next_token_bitmask(self._matcher, self._words.reshape(1, -1))
        forbidden: NDArray[np.bool_] = np.unpackbits(self._words.view(np.uint8), bitorder="little") == 0
        return forbidden


class Grammars:
    """Compiles languages against one tokenizer. llguidance is imported, and its tables made, with the first.

    Any thread may compile.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = ends
        self._tables: Any = None
        self._worker: ThreadPoolExecutor | None = None
        self._making = threading.Lock()

    def compile(self, wanted: StructuredOutputs) -> GrammarMask:
        """A mask at the beginning of the language. Raises RequestError when it is not well formed."""
        from llguidance import LLMatcher

        with self._making:
            tables = self._llguidance_tokenizer()
            worker = self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="miaotui-grammar")
        matcher = LLMatcher(tables, _source(wanted))
        if matcher.is_error():
            reason = str(matcher.get_error()).strip().splitlines()[0]
            raise RequestError(
                f"The language asked for in structured_outputs cannot be used: {reason}.",
                "Correct the schema, expression or grammar.",
                param="structured_outputs",
            )
        return GrammarMask(matcher, self._vocab_size, worker)

    def close(self) -> None:
        """End the worker thread."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def _llguidance_tokenizer(self) -> Any:
        if self._tables is None:
            import llguidance

            try:
                self._tables = llguidance.LLTokenizer(
                    self._tokenizer.backend.to_str(), n_vocab=self._vocab_size, eos_token=list(self._ends) or None
                )
            except ValueError as error:
                raise UnsupportedModelError(
                    f"This model's tokenizer does not allow structured outputs: {error}.",
                    "Leave structured_outputs out.",
                ) from error
        return self._tables


def _source(wanted: StructuredOutputs) -> str:
    """The language as llguidance reads it."""
    from llguidance import LLMatcher

    try:
        if wanted.json is not None:
            schema = wanted.json if isinstance(wanted.json, str) else json.dumps(dict(wanted.json))
            return str(LLMatcher.grammar_from_json_schema(schema))
    except ValueError as error:
        raise RequestError(
            f"The JSON schema in structured_outputs is not JSON: {error}.",
            "Give a JSON schema as an object or as its text.",
            param="structured_outputs",
        ) from error
    if wanted.regex is not None:
        return str(LLMatcher.grammar_from_regex(wanted.regex))
    if wanted.choice is not None:
        texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in wanted.choice)
        return str(LLMatcher.grammar_from_lark(f"start: {texts}"))
    assert wanted.grammar is not None
    return str(LLMatcher.grammar_from_lark(wanted.grammar))
