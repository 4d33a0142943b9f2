"""`/v1/completions`: one or several prompts, continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miaotui.engine.params import SamplingParams
from miaotui.engine.request import CompletionOutput, RequestOutput
from miaotui.serve.openai.errors import ApiError, refused
from miaotui.serve.openai.job import DONE, Model, Usage, error_event, event, new_id, now
from miaotui.serve.openai.sampling import TextLogprobs, aliases, end_tokens, sampling_params, told
from miaotui.serve.openai.schemas import CompletionRequest, validate

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for completions."""


class CompletionJob:
    """See `Job`. Choice `i * n + j` is the continuation `j` of prompt `i`."""

    def __init__(self, model: Model, request: CompletionRequest) -> None:
        self.model = model
        self.name = model.name(request.model)
        self.id, self.created = new_id("cmpl"), now()
        self.echo = bool(request.echo)
        self.scores_only = self.echo and request.max_tokens == 0
        """Whether the one token that has to be generated is kept back, since none was asked for."""
        self.stream = bool(request.stream)
        self.priority = request.priority or 0
        self.aliases = aliases(request)
        self.params = self._params(request)
        self._texts = _listed(request.prompt)
        self.prompts = [_encode(model, prompt, request.add_special_tokens is not False) for prompt in self._texts]
        self._top = request.logprobs
        self._ends = end_tokens(self.params, model.engine.config.eos_token_ids)
        self._usage = Usage() if request.stream_options and request.stream_options.include_usage else None
        self._started: set[int] = set()
        """Prompts whose tokens are counted."""
        self._scorers: dict[int, TextLogprobs] = {}
        """By choice; those that have been told of."""

    def _params(self, request: CompletionRequest) -> SamplingParams:
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise refused("best_of is served only where it equals n. Leave it out.", "best_of", "unsupported_parameter")
        if request.max_tokens == 0 and not self.echo:
            raise refused("max_tokens is 0, which makes sense only with echo. Give at least 1.", "max_tokens")
        return sampling_params(
            request,
            self.aliases,
            max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens or 1,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if self.echo else None,
        )

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [self._choice(i, output, choice) for i, output in enumerate(outputs) for choice in output.outputs]
        usage = Usage.of(outputs)
        if self.scores_only:
            usage.completion = 0
        return self._envelope(sorted(choices, key=lambda choice: choice["index"])) | {"usage": usage.as_dict()}

    def chunks(self, prompt: int, output: RequestOutput) -> bytes:
        wire = b""
        for choice in output.outputs:
            told_of = self._choice(prompt, output, choice)
            if told_of["text"] or told_of["finish_reason"] or told_of["logprobs"]:
                wire += event(self._envelope([told_of]) | ({} if self._usage is None else {"usage": None}))
        if self._usage is not None:
            if prompt not in self._started:
                self._started.add(prompt)
                self._usage.add_prompt(output)
            if not self.scores_only:
                self._usage.completion += sum(len(choice.token_ids) for choice in output.outputs)
        return wire

    def closing(self) -> bytes:
        if self._usage is None:
            return DONE
        return event(self._envelope([]) | {"usage": self._usage.as_dict()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error)

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }

    def _choice(self, prompt: int, output: RequestOutput, choice: CompletionOutput) -> dict[str, Any]:
        """What is new of a continuation; its first part begins with the prompt where that is to be echoed."""
        index = prompt * self.params.n + choice.index
        first = index not in self._scorers
        scorer = self._scorers.setdefault(index, TextLogprobs(self._top or 0))
        text = "" if self.scores_only else choice.text
        if first and self.echo:
            text = self._text(prompt) + text
        logprobs = None
        if self._top is not None:
            scored: list[Any] = [] if self.scores_only else list(told(choice, self._ends, self.params))
            if first and self.echo:
                scored = [*zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True), *scored]
            logprobs = scorer.of(scored, self.model.tokenizer) if scored else None
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if self.scores_only and choice.finish_reason else choice.finish_reason,
        }

    def _text(self, prompt: int) -> str:
        asked = self._texts[prompt]
        return asked if isinstance(asked, str) else self.model.tokenizer.decode(asked, skip_special_tokens=False)


def prepare(model: Model, body: Mapping[str, Any]) -> CompletionJob:
    """Understand a request; slow for a long prompt. Raises ApiError and RequestError."""
    return CompletionJob(model, validate(CompletionRequest, body))


def _listed(prompt: Any) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _encode(model: Model, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
    return model.encode(prompt, "prompt", add_special_tokens=add_special_tokens) if isinstance(prompt, str) else prompt
