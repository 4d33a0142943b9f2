"""What a caller may ask of sampling. Names, defaults and meanings are vLLM's; a wrong value is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miaotui.errors import RequestError


@dataclass(frozen=True)
class StructuredOutputs:
    """The one language that the answer must be in: a JSON schema, a regular expression, a Lark grammar or a choice."""

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "grammar", "choice") if getattr(self, name) is not None]
        _require(
            len(given) == 1,
            "structured_outputs",
            f"got {' and '.join(given) or 'none'} of json, regex, grammar and choice",
            "Give exactly one of them.",
        )
        if self.choice is not None:
            _require(
                len(self.choice) > 0 and all(isinstance(c, str) and c for c in self.choice),
                "structured_outputs",
                "choice has no text to choose from",
                "Give at least one non-empty string.",
            )


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises RequestError, with the parameter's name, for a value that means nothing."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    """New tokens at most; None means as many as the context holds."""
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many likeliest ones; -1 means the whole vocabulary."""
    prompt_logprobs: int | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_distribution()
        self._check_lists()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is the logits' argmax and nothing else is wanted of them, ever."""
        return (
            self.greedy
            and self.logprobs is None
            and self.prompt_logprobs is None
            and self.min_tokens == 0
            and not self.logit_bias
            and not self.bad_words
            and self.allowed_token_ids is None
            and self.structured_outputs is None
            and not self.penalised
        )

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def _check_counts(self) -> None:
        whole = "Give a whole number."
        _require(_is_int(self.n) and self.n >= 1, "n", f"is {self.n!r}", "Give a whole number of at least 1.")
        if self.max_tokens is not None:
            _require(
                _is_int(self.max_tokens) and self.max_tokens >= 1,
                "max_tokens",
                f"is {self.max_tokens!r}",
                "Give at least 1, or leave it out for all that fits.",
            )
        _require(
            _is_int(self.min_tokens) and 0 <= self.min_tokens <= (self.max_tokens or math.inf),
            "min_tokens",
            f"is {self.min_tokens!r}",
            "Give a whole number from 0 to max_tokens.",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _require(_is_int(value) and value >= -1, name, f"is {value!r}", "Give -1 (all), 0 or more.")
        if self.seed is not None:
            _require(_is_int(self.seed), "seed", f"is {self.seed!r}", whole)

    def _check_distribution(self) -> None:
        _in_range("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or more")
        _in_range("top_p", self.top_p, 0.0, 1.0, "more than 0 and at most 1")
        _require(self.top_p > 0.0, "top_p", "is 0", "Give more than 0 and at most 1.")
        _in_range("min_p", self.min_p, 0.0, 1.0, "0 to 1")
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0, "-2 to 2")
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "-2 to 2")
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "more than 0")
        _require(self.repetition_penalty > 0.0, "repetition_penalty", "is 0", "Give more than 0; 1 is none.")
        _require(_is_int(self.top_k) and self.top_k >= -1, "top_k", f"is {self.top_k!r}", "Give 0 or -1 (off) or more.")

    def _check_lists(self) -> None:
        _require(
            all(isinstance(s, str) and s for s in self.stops), "stop", "holds an empty string", "Give non-empty text."
        )
        _require(
            all(isinstance(w, str) and w.strip() for w in self.bad_words or ()),
            "bad_words",
            "holds an empty string",
            "Give non-empty words.",
        )
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name)
            if ids is not None:
                _require(all(_is_int(i) and i >= 0 for i in ids), name, "holds a non-id", "Give token ids from 0 up.")
        if self.allowed_token_ids is not None:
            _require(len(self.allowed_token_ids) > 0, "allowed_token_ids", "is empty", "Allow at least one token.")
        for token, bias in (self.logit_bias or {}).items():
            _require(
                _is_int(token) and token >= 0 and _is_number(bias) and -100 <= bias <= 100,
                "logit_bias",
                f"maps {token!r} to {bias!r}",
                "Map token ids to numbers from -100 to 100.",
            )


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search as transformers' `generate(num_beams=…, do_sample=False)` does it.

    A finished beam's score is its summed log-probability / length ** length_penalty. `early_stopping` True stops
    once `beam_width` beams have finished, False when the best open beam scores below the worst finished one.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    n: int | None = None
    """How many beams to return, best first; None means all."""

    def __post_init__(self) -> None:
        _require(
            _is_int(self.beam_width) and self.beam_width >= 1,
            "beam_width",
            f"is {self.beam_width!r}",
            "Give a whole number of at least 1.",
        )
        _require(
            _is_int(self.max_tokens) and self.max_tokens >= 1,
            "max_tokens",
            f"is {self.max_tokens!r}",
            "Give a whole number of at least 1.",
        )
        _in_range("length_penalty", self.length_penalty, -math.inf, math.inf, "a number")
        if self.n is not None:
            _require(
                _is_int(self.n) and 1 <= self.n <= self.beam_width,
                "n",
                f"is {self.n!r} with {self.beam_width} beams",
                "Ask for at most beam_width beams.",
            )


_GREEDY_BELOW = 1e-5
"""A temperature under this is greedy, as in vLLM: dividing by it would overflow."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _in_range(name: str, value: object, low: float, high: float, wanted: str) -> None:
    inside = _is_number(value) and low <= value <= high  # type: ignore[operator]
    _require(inside, name, f"is {value!r}", f"Give {wanted}.")


def _require(holds: bool, param: str, what: str, hint: str) -> None:
    if not holds:
        raise RequestError(f"The parameter {param} {what}.", hint, param=param)
