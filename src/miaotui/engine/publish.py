"""From chosen tokens to outputs: text, the end of a sequence and why, what streams and finished requests get."""

from __future__ import annotations

import time
from typing import cast

from miaotui.engine.params import SamplingParams
from miaotui.engine.request import CompletionOutput, FinishReason, Request, RequestOutput, Sequence
from miaotui.engine.sampler import NOTHING_LEFT, Choice
from miaotui.engine.text import TextTail, decode
from miaotui.model.tokenizer import Tokenizer


class Publisher:
    """Appends tokens to sequences and makes their outputs.

    It decodes as it goes only where someone watches, a stream or a stop string; else once, at the end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def start(self, sequence: Sequence) -> None:
        """Watch the text of a sequence that has just begun, where it must be watched."""
        params = _params(sequence)
        if sequence.request.stream or params.stops:
            sequence.tail = TextTail(self._tokenizer, params)

    def accept(self, sequence: Sequence, choice: Choice) -> None:
        """Append a chosen token; set `finish_reason` when it is the last. A watched text grows."""
        request, token = sequence.request, choice.token
        if token == NOTHING_LEFT:
            self.finish(sequence, "stop")
            return
        sequence.tokens.append(token)
        if sequence.logprobs is not None and choice.logprobs is not None:
            sequence.logprobs.append(choice.logprobs)
            sequence.cumulative_logprob += choice.logprobs[token].logprob
        if token in request.stop_tokens:
            self._stop_at(sequence, token)
            return
        if sequence.tail is not None:
            self._grow(sequence, sequence.tail, (token,))
        if sequence.finish_reason is None and sequence.output_len >= request.max_tokens:
            self.finish(sequence, "length")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence; what its text still held back comes out, and may yet hold a stop string."""
        sequence.finish_reason = reason
        if sequence.tail is not None:
            sequence.text += sequence.tail.flush(watch=_watched(sequence))
            if sequence.tail.stopped_by is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", sequence.tail.stopped_by

    def delta(self, sequence: Sequence) -> CompletionOutput:
        """What is new in a sequence since its last delta."""
        tokens, characters = sequence.sent
        sequence.sent = (sequence.output_len, len(sequence.text))
        return _output(
            sequence,
            text=sequence.text[characters:],
            token_ids=sequence.tokens[sequence.prompt_len + tokens :].tolist(),
            logprobs_from=tokens,
        )

    def whole(self, sequence: Sequence) -> CompletionOutput:
        """A finished sequence's output."""
        text = sequence.text if sequence.tail is not None else self._decode(sequence)
        return _output(sequence, text=text, token_ids=sequence.output_token_ids, logprobs_from=0)

    def beams(self, request: Request, count: int) -> list[CompletionOutput]:
        """The best `count` beams of a finished search."""
        assert request.beam is not None
        return [
            CompletionOutput(
                index=index,
                text=decode(
                    self._tokenizer,
                    beam.token_ids[:-1] if beam.reason == "stop" else beam.token_ids,
                    skip_special_tokens=True,
                ),
                token_ids=beam.token_ids,
                cumulative_logprob=beam.total,
                finish_reason=beam.reason,
            )
            for index, beam in enumerate(request.beam.finished[:count])
        ]

    def request(self, request: Request, outputs: list[CompletionOutput]) -> RequestOutput:
        """The request's output, with these continuations in it."""
        if request.finished and request.metrics.finished_time is None:
            request.metrics.finished_time = time.monotonic()
        return RequestOutput(
            request_id=request.id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            finished=request.finished,
            metrics=request.metrics,
            num_cached_tokens=request.num_cached_tokens,
            prompt_logprobs=request.prompt_logprobs,
        )

    def _stop_at(self, sequence: Sequence, token: int) -> None:
        """End at a token that is no part of the text, unless asked for."""
        params = _params(sequence)
        if sequence.tail is not None and params.include_stop_str_in_output:
            self._grow(sequence, sequence.tail, (token,))
        if sequence.finish_reason is None:
            sequence.stop_reason = token if token in (params.stop_token_ids or ()) else None
            self.finish(sequence, "stop")

    def _grow(self, sequence: Sequence, tail: TextTail, ids: tuple[int, ...]) -> None:
        sequence.text += tail.push(ids, watch=_watched(sequence))
        if tail.stopped_by is not None:
            sequence.finish_reason, sequence.stop_reason = "stop", tail.stopped_by

    def _decode(self, sequence: Sequence) -> str:
        params, ids = _params(sequence), sequence.output_token_ids
        ended = sequence.finish_reason == "stop" and ids and ids[-1] in sequence.request.stop_tokens
        if ended and not params.include_stop_str_in_output:
            ids.pop()
        return decode(self._tokenizer, ids, skip_special_tokens=params.skip_special_tokens)


def _output(sequence: Sequence, *, text: str, token_ids: list[int], logprobs_from: int) -> CompletionOutput:
    scored = sequence.logprobs is not None
    return CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=sequence.cumulative_logprob if scored else None,
        logprobs=sequence.logprobs[logprobs_from:] if sequence.logprobs is not None else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def _params(sequence: Sequence) -> SamplingParams:
    return cast(SamplingParams, sequence.request.params)


def _watched(sequence: Sequence) -> bool:
    """Stop strings count only in text that comes after `min_tokens` tokens."""
    return sequence.output_len > _params(sequence).min_tokens
