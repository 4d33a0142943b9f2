"""`/v1/responses`: an input answered with items, and gone on from by its id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from miaotui.engine.params import SamplingParams, StructuredOutputs
from miaotui.engine.request import CompletionOutput, RequestOutput
from miaotui.serve.openai.chat import conversation_prompt
from miaotui.serve.openai.errors import ApiError, refused
from miaotui.serve.openai.job import Model, Usage, now
from miaotui.serve.openai.response_events import GrowingResponse, new_id
from miaotui.serve.openai.response_items import conversation_of, instructed, with_output
from miaotui.serve.openai.response_schemas import AllowedFunctions, ChosenFunction, ResponseRequest, TextFormat
from miaotui.serve.openai.response_store import Stored
from miaotui.serve.openai.sampling import chat_logprobs, end_tokens, renamed, told
from miaotui.serve.openai.schemas import validate
from miaotui.serve.openai.tool_calls.offer import Choice, Function, Offer, make_offer
from miaotui.serve.openai.voice import Voice

_SAME_NAMES = (
    "temperature",
    "top_p",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_k",
    "min_p",
    "ignore_eos",
)
"""Parameters that SamplingParams calls the same."""
_ECHOED = ("instructions", "max_output_tokens", "previous_response_id", "user", "safety_identifier", "prompt_cache_key")


class ResponseJob:
    """See `Job`."""

    def __init__(self, model: Model, request: ResponseRequest) -> None:
        self.model = model
        self.id, self.created = new_id("resp"), now()
        self.stream = bool(request.stream)
        self.priority = request.priority or 0
        self.aliases = {"max_tokens": "max_output_tokens", "prompt": "input", "structured_outputs": "text.format"}
        name = model.name(request.model)
        self._top = _top_logprobs(request)
        offer = _offer(model, request)
        self.params = self._params(request, offer)
        self._conversation = conversation_of(_earlier(model, request.previous_response_id), request.input)
        with renamed({"messages": "input"}):
            self.prompts = [
                conversation_prompt(
                    model,
                    instructed(request.instructions, self._conversation),
                    offer,
                    True,
                    request.chat_template_kwargs,
                    param="input",
                )
            ]
        self._store = request.store is not False
        self._size = len(orjson.dumps(self._conversation)) if self._store else 0
        self._ends = end_tokens(self.params, model.engine.config.eos_token_ids)
        self._voice = Voice(None if offer is None else offer.new_stream())
        self._growing = GrowingResponse(_head(self.id, self.created, name, request))
        self._usage = Usage()
        self._started = self._cut = False
        self._waiting: list[dict[str, Any]] = []
        """Log-probabilities of tokens whose text has not come yet."""

    def _params(self, request: ResponseRequest, offer: Offer | None) -> SamplingParams:
        if request.stream_options is not None and not request.stream:
            raise refused("stream_options is for streams only. Leave it out, or set stream.", "stream_options")
        fields = {name: value for name in _SAME_NAMES if (value := getattr(request, name)) is not None}
        with renamed(self.aliases):
            params = SamplingParams(
                **fields,
                max_tokens=request.max_output_tokens,
                logprobs=self._top,
                structured_outputs=_language(request.text.format if request.text is not None else None),
            )
        if offer is None:
            return params
        if self._top is not None and offer.choice.mode != "none":
            raise refused("Log-probabilities are not told beside tools. Leave one out.", "top_logprobs")
        self.aliases["structured_outputs"] = "tools"
        return offer.constrain(params)

    # -- whole ---------------------------------------------------------------------------------------------
    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        self._take(outputs[0])
        return self._end()[1]

    # -- streamed ------------------------------------------------------------------------------------------
    def chunks(self, prompt: int, output: RequestOutput) -> bytes:
        opening = b"" if self._started else self._growing.opening()
        return opening + self._take(output)

    def closing(self) -> bytes:
        wire, response = self._end()
        return wire + self._growing.closing(response)

    def failure(self, error: ApiError) -> bytes:
        opening = b"" if self._started else self._growing.opening()
        told_as = {"code": "server_error", "message": error.message}
        return opening + self._growing.closing(self._growing.response("failed", error=told_as))

    # -- both ----------------------------------------------------------------------------------------------
    def _take(self, output: RequestOutput) -> bytes:
        """Take in what is new of the answer; the events that tell of it."""
        if not self._started:
            self._started = True
            self._usage.add_prompt(output)
        (choice,) = output.outputs
        self._usage.completion += len(choice.token_ids)
        self._cut = choice.finish_reason == "length"
        self._waiting += self._logprobs(choice)
        wire = b""
        for delta in self._voice.say(choice):
            logprobs, self._waiting = self._waiting, []
            wire += self._growing.add(delta, logprobs)
        return wire

    def _end(self) -> tuple[bytes, dict[str, Any]]:
        """The last events of the output, and the response; it is stored, if it is to be."""
        wire = self._growing.end(self._cut, self._waiting)
        response = self._growing.response(
            "incomplete" if self._cut else "completed",
            completed_at=None if self._cut else now(),
            incomplete_details={"reason": "max_output_tokens"} if self._cut else None,
            usage=_usage(self._usage),
        )
        if self._store:
            size = self._size + len(orjson.dumps(response))
            self.model.responses.keep(Stored(response, with_output(self._conversation, self._growing.output), size))
        return wire, response

    def _logprobs(self, choice: CompletionOutput) -> list[dict[str, Any]]:
        if self._top is None:
            return []
        return chat_logprobs(told(choice, self._ends, self.params), self._top, self.model.tokenizer)


def prepare(model: Model, body: Mapping[str, Any]) -> ResponseJob:
    """Understand a request; slow for a long input. Raises ApiError and RequestError."""
    return ResponseJob(model, validate(ResponseRequest, body))


def stored(model: Model, response_id: str) -> Mapping[str, Any]:
    """A response that was kept. Raises ApiError 404."""
    found = model.responses.get(response_id)
    if found is None:
        raise _not_kept(404, response_id, None)
    return found.response


def forget(model: Model, response_id: str) -> dict[str, Any]:
    """Forget a response that was kept. Raises ApiError 404."""
    if not model.responses.forget(response_id):
        raise _not_kept(404, response_id, None)
    return {"id": response_id, "object": "response", "deleted": True}


def _earlier(model: Model, previous: str | None) -> Sequence[Mapping[str, Any]]:
    """The conversation that goes on."""
    if previous is None:
        return ()
    found = model.responses.get(previous)
    if found is None:
        raise _not_kept(400, previous, "previous_response_id")
    return found.conversation


def _not_kept(status: int, response_id: str, param: str | None) -> ApiError:
    message = f"There is no response {response_id[:80]!r}. It was never stored, or is no longer; send the whole input."
    return ApiError(status, message, param=param, code="previous_response_not_found" if param else "not_found")


def _top_logprobs(request: ResponseRequest) -> int | None:
    """Likeliest tokens to tell beside each; None: no log-probabilities are wanted."""
    return (request.top_logprobs or 0) if request.include or request.top_logprobs is not None else None


def _language(asked: TextFormat | None) -> StructuredOutputs | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return StructuredOutputs(json={"type": "object"})
    if asked.schema_ is None or asked.name is None:
        missing = "schema" if asked.schema_ is None else "name"
        raise refused(f"text.format has no {missing}.", f"text.format.{missing}", "missing_required_parameter")
    return StructuredOutputs(json=asked.schema_)


def _offer(model: Model, request: ResponseRequest) -> Offer | None:
    functions = [
        Function(tool.name, tool.description, tool.parameters, bool(tool.strict)) for tool in request.tools or ()
    ]
    return make_offer(
        functions,
        _choice(request),
        template=model.chat_template,
        tokenizer=model.tokenizer,
        parser=model.tool_call_parser,
    )


def _choice(request: ResponseRequest) -> Choice:
    asked, several = request.tool_choice, request.parallel_tool_calls is not False
    if isinstance(asked, ChosenFunction):
        return Choice("required", (asked.name,), several=False)
    if isinstance(asked, AllowedFunctions):
        return Choice(asked.mode, tuple(tool.name for tool in asked.tools), several)
    return Choice(asked or "auto", None, several)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _head(response_id: str, created: int, model: str, request: ResponseRequest) -> dict[str, Any]:
    """What a response repeats of its request, with the defaults that were taken."""
    asked = request.model_dump(by_alias=True)
    text_format = (asked["text"] or {}).get("format") or {"type": "text"}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "model": model,
        "error": None,
        "incomplete_details": None,
        **{name: asked[name] for name in _ECHOED},
        "background": False,
        "metadata": asked["metadata"] or {},
        "max_tool_calls": None,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {name: value for name, value in text_format.items() if value is not None}},
        "tool_choice": asked["tool_choice"] or "auto",
        "tools": asked["tools"] or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
    }
