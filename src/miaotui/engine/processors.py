"""What changes a row of logits before a token is drawn from it, one small class for each control.

A processor belongs to one sequence. `apply` is given that sequence's tokens, prompt included; it works in place.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from miaotui.engine.params import SamplingParams
from miaotui.errors import RequestError

Row = NDArray[np.float32]
Encode = Callable[[str], list[int]]


class Processor(Protocol):
    def apply(self, row: Row, tokens: array[int]) -> None:
        """Change `row` [vocabulary], the logits of the token that follows `tokens`."""
        ...


class AllowedTokens:
    """Nothing but these tokens."""

    def __init__(self, allowed: Iterable[int], vocab_size: int) -> None:
        self._forbidden = np.ones(vocab_size, bool)
        self._forbidden[list(allowed)] = False

    def apply(self, row: Row, tokens: array[int]) -> None:
        row[self._forbidden] = -np.inf


class BadWords:
    """No token that would complete one of these token sequences in the output (vLLM: the prompt does not count)."""

    def __init__(self, words: list[list[int]], prompt_len: int) -> None:
        self._words = [array("i", word) for word in words]
        self._prompt_len = prompt_len

    def apply(self, row: Row, tokens: array[int]) -> None:
        for word in self._words:
            before = len(word) - 1
            if len(tokens) - self._prompt_len >= before and tokens[len(tokens) - before :] == word[:before]:
                row[word[-1]] = -np.inf


class MinTokens:
    """No token that ends the sequence before it has `least` new tokens, unless an end is all that is left."""

    def __init__(self, least: int, ends: frozenset[int], prompt_len: int) -> None:
        self._until = prompt_len + least
        self._ends = sorted(ends)

    def apply(self, row: Row, tokens: array[int]) -> None:
        if len(tokens) < self._until:
            before = row[self._ends]
            row[self._ends] = -np.inf
            if row.max() == -np.inf:
                row[self._ends] = before


class LogitBias:
    """A number added to each of some tokens' logits."""

    def __init__(self, bias: dict[int, float]) -> None:
        self._ids = np.fromiter(bias, np.intp, len(bias))
        self._amounts = np.fromiter(bias.values(), np.float32, len(bias))

    def apply(self, row: Row, tokens: array[int]) -> None:
        row[self._ids] += self._amounts


class Penalties:
    """Repetition (CTRL, Keskar et al. 2019, over prompt and output), then frequency and presence (over the output).

    Every token seen: logit / repetition when positive, · repetition when not. Every token of the output:
    - frequency · its count - presence.
    """

    def __init__(self, params: SamplingParams, prompt_len: int) -> None:
        self._repetition = np.float32(params.repetition_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._prompt_len = prompt_len
        self._counts: dict[int, int] = {}
        self._read = 0

    def apply(self, row: Row, tokens: array[int]) -> None:
        for at in range(self._read, len(tokens)):
            self._counts[tokens[at]] = self._counts.get(tokens[at], 0) + (at >= self._prompt_len)
        self._read = len(tokens)
        ids = np.fromiter(self._counts, np.intp, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        seen = row[ids]
        seen = np.where(seen > 0, seen / self._repetition, seen * self._repetition)
        row[ids] = seen - self._frequency * counts - self._presence * (counts > 0)


def build_processors(
    params: SamplingParams,
    *,
    ends: frozenset[int],
    prompt_len: int,
    vocab_size: int,
    encode: Encode,
    grammar: Processor | None,
) -> list[Processor]:
    """What `params` asks for, in the order it is applied. Raises RequestError for a token outside the vocabulary."""
    built: list[Processor] = []
    if grammar is not None:
        built.append(grammar)
    if params.allowed_token_ids is not None:
        built.append(AllowedTokens(params.allowed_token_ids, vocab_size))
    if params.bad_words:
        words = bad_word_tokens(params.bad_words, encode)
        built.append(BadWords([word for word in words if max(word) < vocab_size], prompt_len))
    if params.min_tokens > 0 and ends:
        built.append(MinTokens(params.min_tokens, ends, prompt_len))
    if params.logit_bias:
        built.append(LogitBias(dict(params.logit_bias)))
    if params.penalised:
        built.append(Penalties(params, prompt_len))
    return built


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for a token id, in any parameter, that the model does not have."""
    named = {
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids or (),
        "logit_bias": params.logit_bias or (),
    }
    for name, ids in named.items():
        for token in ids:
            if token >= vocab_size:
                raise RequestError(
                    f"The parameter {name} names token {token}, but the vocabulary has {vocab_size} tokens.",
                    f"Use ids from 0 to {vocab_size - 1}.",
                    param=name,
                )


def bad_word_tokens(words: Iterable[str], encode: Encode) -> list[list[int]]:
    """Each word's tokens, alone and, where it differs in its first token only, after a space (as vLLM does it)."""
    found: list[list[int]] = []
    for word in words:
        alone, spaced = encode(word.lstrip()), encode(" " + word.lstrip())
        if alone:
            found.append(alone)
        if spaced and spaced[0] != alone[0] and len(spaced) == len(alone):
            found.append(spaced)
    return found
