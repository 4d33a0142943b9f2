"""Requests and their sequences while they live, and the outputs that a caller sees (vLLM's shape)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from miaotui.engine.params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from miaotui.engine.beam import BeamSearch
    from miaotui.engine.grammar import GrammarMask
    from miaotui.engine.processors import Processor
    from miaotui.engine.text import TextTail

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural log-probability under the model (before any sampling control) and its rank, from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Moments of a request's life, in seconds of `time.monotonic`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. In a stream: what is new since the output before."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """What a request has produced: everything, when it is finished; in a stream, the continuations that grew."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Request:
    """One prompt and what is asked of it. It owns its sequences: one, or `n` of them, or the beams of a search."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams | BeamSearchParams,
        *,
        max_tokens: int,
        seed: int,
        stop_tokens: frozenset[int],
        priority: int,
        arrival: int,
        stream: bool,
        now: float,
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.max_tokens = max_tokens
        """New tokens at most, for each sequence: what was asked, or what the context leaves."""
        self.seed = seed
        self.stop_tokens = stop_tokens
        """Tokens that end a sequence: the model's own ends, unless ignored, and the caller's."""
        self.priority = priority
        self.arrival = arrival
        self.stream = stream
        self.metrics = RequestMetrics(arrival_time=now)
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.beam: BeamSearch | None = None
        self.sequences: list[Sequence] = [Sequence(self, 0, array("i", prompt_token_ids))]

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)


@dataclass(slots=True, eq=False)
class Sequence:
    """One line of tokens: the prompt and what has been chosen after it.

    `computed` tokens have their keys and values in the cache, in `blocks`. The others are still to be run; when none
    is left, the logits of the last one give the next. The scheduler alone moves `computed` and `blocks`.
    """

    request: Request
    index: int
    tokens: array[int]
    prompt_len: int = 0
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    chain: list[bytes] = field(default_factory=list)
    """Hashes of the leading full blocks of `tokens`; see blocks.py."""

    rank: tuple[int, int, int] = (0, 0, 0)
    """Urgency, the smallest first: priority, arrival, index."""
    plain: bool = False
    """Whether its next token is the plain argmax of its logits."""
    all_rows: bool = False
    """Whether the logits of every prompt token are wanted, not only the last one's."""

    processors: list[Processor] | None = None
    tail: TextTail | None = None
    text: str = ""
    """What `tail` has let out. Without a tail nobody watches, and the text is decoded at the end."""
    sent: tuple[int, int] = (0, 0)
    """Output tokens and characters that a stream has had."""
    grammar: GrammarMask | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        request = self.request
        self.prompt_len = len(request.prompt_token_ids)
        self.rank = (request.priority, request.arrival, self.index)
        params = request.params
        if isinstance(params, SamplingParams):
            self.plain = params.plain_greedy
            self.all_rows = params.prompt_logprobs is not None and self.index == 0
            self.logprobs = None if params.logprobs is None else []

    @property
    def remaining(self) -> int:
        """Tokens still to be run before the next can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.prompt_len :].tolist()
