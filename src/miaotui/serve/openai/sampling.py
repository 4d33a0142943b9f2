"""From a request's fields to SamplingParams, and from log-probabilities to what OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from miaotui.engine.params import SamplingParams, StructuredOutputs
from miaotui.engine.request import CompletionOutput, Logprob
from miaotui.errors import RequestError
from miaotui.model.tokenizer import Tokenizer
from miaotui.serve.openai.errors import refused
from miaotui.serve.openai.schemas import ResponseFormat, Sampled

LOWEST = -9999.0
"""What stands for a log-probability of minus infinity, which JSON has no number for (vLLM's choice)."""

_SAME_NAMES = (
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


def aliases(request: Sampled) -> dict[str, str]:
    """The names under which a request states parameters of SamplingParams, where they differ."""
    return {} if request.response_format is None else {"structured_outputs": "response_format"}


def sampling_params(request: Sampled, names: Mapping[str, str], **more: Any) -> SamplingParams:
    """The request's parameters; `more` are those that chat and completions state in their own ways, `names` how.

    Raises ApiError for combinations, RequestError for values, that cannot be.
    """
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options is for streams only. Leave it out, or set stream.", "stream_options")
    fields = {name: value for name in _SAME_NAMES if (value := getattr(request, name)) is not None}
    if request.logit_bias:
        fields["logit_bias"] = {_token_id(token): bias for token, bias in request.logit_bias.items()}
    wanted = _structured(request)
    with renamed(names):
        return SamplingParams(**fields, **more, structured_outputs=wanted)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """A RequestError that comes out names its parameter as the request does."""
    try:
        yield
    except RequestError as error:
        name, message = names.get(error.param or "", error.param), error.message
        for word in ("parameter", "in"):
            message = message.replace(f"{word} {error.param} ", f"{word} {name} ")
        raise RequestError(message, error.hint, name) from error


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise refused(f"logit_bias has the key {text[:40]!r}, which is no token id.", "logit_bias", "invalid_value")
    return int(text)


def _structured(request: Sampled) -> StructuredOutputs | None:
    """The language that the answer must be in."""
    given, asked = request.structured_outputs, request.response_format
    found = None if asked is None else _schema(asked)
    if given is None:
        return found
    if found is not None:
        raise refused("Both response_format and structured_outputs are given. Leave one out.", "structured_outputs")
    return StructuredOutputs(json=given.json_, regex=given.regex, grammar=given.grammar, choice=given.choice)


def _schema(asked: ResponseFormat) -> StructuredOutputs | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return StructuredOutputs(json={"type": "object"})
    if asked.json_schema is None:
        raise refused(
            "response_format has no json_schema.", "response_format.json_schema", "missing_required_parameter"
        )
    return StructuredOutputs(json=asked.json_schema.schema_ if asked.json_schema.schema_ is not None else {})


# -- log-probabilities -----------------------------------------------------------------------------------
def told(
    choice: CompletionOutput, ends: frozenset[int], params: SamplingParams
) -> list[tuple[int, dict[int, Logprob]]]:
    """A choice's tokens with their log-probabilities, without the token that ended it: that is no part of the text."""
    scored = list(zip(choice.token_ids, choice.logprobs or (), strict=False))
    ended = choice.finish_reason == "stop" and not isinstance(choice.stop_reason, str)
    if ended and scored and scored[-1][0] in ends and not params.include_stop_str_in_output:
        scored.pop()
    return scored


def end_tokens(params: SamplingParams, eos: Sequence[int]) -> frozenset[int]:
    return frozenset((*(() if params.ignore_eos else eos), *(params.stop_token_ids or ())))


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(
    scored: Sequence[tuple[int, dict[int, Logprob]]], top: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """`choices[].logprobs.content`: each token with its `top` likeliest."""

    def entry(token: int, found: Logprob) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": found.decoded_token or "", "logprob": finite(found.logprob), "bytes": list(raw)}

    return [
        {
            **entry(token, found[token]),
            "top_logprobs": [entry(other, likely) for other, likely in found.items() if likely.rank <= top],
        }
        for token, found in scored
    ]


class TextLogprobs:
    """`choices[].logprobs` of completions, whose offsets count through the whole text of a choice."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._offset = 0

    def of(self, scored: Sequence[tuple[int, dict[int, Logprob] | None]], tokenizer: Tokenizer) -> dict[str, Any]:
        """The lists for these tokens, which follow those of the call before. None stands for a text's first token."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token, found in scored:
            text = tokenizer.decode([token], skip_special_tokens=False)
            tokens.append(text)
            logprobs.append(None if found is None else finite(found[token].logprob))
            tops.append(None if found is None else self._likeliest(found))
            offsets.append(self._offset)
            self._offset += len(text)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _likeliest(self, found: dict[int, Logprob]) -> dict[str, float]:
        """By text, so that of two tokens with the same one the likelier stays."""
        likely: dict[str, float] = {}
        for logprob in sorted(found.values(), key=lambda f: f.rank):
            likely.setdefault(logprob.decoded_token or "", finite(logprob.logprob))
        return likely
