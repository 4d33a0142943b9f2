"""`/v1/chat/completions`: one conversation, answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miaotui.engine.params import SamplingParams
from miaotui.engine.request import CompletionOutput, RequestOutput
from miaotui.errors import RequestError
from miaotui.serve.openai.errors import ApiError, refused
from miaotui.serve.openai.job import DONE, Model, Usage, error_event, event, new_id, now
from miaotui.serve.openai.sampling import aliases, chat_logprobs, end_tokens, sampling_params, told
from miaotui.serve.openai.schemas import AllowedTools, ChatRequest, Message, NamedTool, Tool, validate
from miaotui.serve.openai.tool_calls.conversation import for_template
from miaotui.serve.openai.tool_calls.offer import Choice, Function, Mode, Offer, make_offer
from miaotui.serve.openai.voice import Voice, as_chat, whole_message

_LONG = 1 << 17
"""Characters of a conversation from which its length is looked at before it is encoded."""


class ChatJob:
    """See `Job`."""

    def __init__(self, model: Model, request: ChatRequest) -> None:
        self.model = model
        self.name = model.name(request.model)
        self.id, self.created = new_id("chatcmpl"), now()
        self.stream = bool(request.stream)
        self.priority = request.priority or 0
        self._top = _top_logprobs(request)
        self.aliases = {"prompt": "messages", **aliases(request)}
        if request.max_completion_tokens is not None:
            self.aliases["max_tokens"] = "max_completion_tokens"
        self.params = self._params(request)
        self._offer = offer_of(model, request.tools, request.tool_choice, request.parallel_tool_calls)
        if self._offer is not None:
            self.params = self._offer.constrain(self.params)
            self.aliases["structured_outputs"] = "tools"
        self.prompts = [
            chat_prompt(
                model, request.messages, self._offer, request.add_generation_prompt, request.chat_template_kwargs
            )
        ]
        self._ends = end_tokens(self.params, model.engine.config.eos_token_ids)
        self._usage = Usage() if request.stream_options and request.stream_options.include_usage else None
        self._started = False
        self._voices: dict[int, Voice] = {}
        """By choice; those that have been heard."""
        self._head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.name}

    def _params(self, request: ChatRequest) -> SamplingParams:
        most = request.max_completion_tokens
        if most is not None and request.max_tokens not in (None, most):
            raise refused("max_tokens and max_completion_tokens differ. Leave max_tokens out.", "max_tokens")
        return sampling_params(
            request, self.aliases, max_tokens=request.max_tokens if most is None else most, logprobs=self._top
        )

    # -- whole ---------------------------------------------------------------------------------------------
    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.name,
            "choices": [self._choice(choice) for choice in output.outputs],
            "usage": Usage.of(outputs).as_dict(),
        }

    def _choice(self, choice: CompletionOutput) -> dict[str, Any]:
        voice = self._voice()
        message = {"role": "assistant", **whole_message(voice.say(choice)), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": voice.finish_reason(choice),
        }

    def _voice(self) -> Voice:
        return Voice(None if self._offer is None else self._offer.new_stream())

    # -- streamed ------------------------------------------------------------------------------------------
    def chunks(self, prompt: int, output: RequestOutput) -> bytes:
        wire = []
        for choice in output.outputs:
            voice = self._voices.get(choice.index)
            if voice is None:
                voice = self._voices[choice.index] = self._voice()
                wire.append(self._chunk(choice.index, {"role": "assistant", "content": ""}))
            logprobs, finish = self._logprobs(choice), voice.finish_reason
            deltas = [as_chat(delta) for delta in voice.say(choice)]
            if not deltas and (choice.finish_reason or logprobs):
                deltas = [{}]
            for i, delta in enumerate(deltas):
                last = i == len(deltas) - 1
                wire.append(self._chunk(choice.index, delta, None if i else logprobs, finish(choice) if last else None))
        if self._usage is not None:
            if not self._started:
                self._started = True
                self._usage.add_prompt(output)
            self._usage.completion += sum(len(choice.token_ids) for choice in output.outputs)
        return b"".join(wire)

    def closing(self) -> bytes:
        if self._usage is None:
            return DONE
        return event({**self._head, "choices": [], "usage": self._usage.as_dict()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if self._usage is None:
            return event({**self._head, "choices": [choice]})
        return event({**self._head, "choices": [choice], "usage": None})

    def _logprobs(self, choice: CompletionOutput) -> dict[str, Any] | None:
        if self._top is None:
            return None
        scored = told(choice, self._ends, self.params)
        return {"content": chat_logprobs(scored, self._top, self.model.tokenizer), "refusal": None}


def prepare(model: Model, body: Mapping[str, Any]) -> ChatJob:
    """Understand a request; slow for a long conversation. Raises ApiError and RequestError."""
    return ChatJob(model, validate(ChatRequest, body))


def offer_of(
    model: Model,
    tools: Sequence[Tool] | None,
    tool_choice: Mode | NamedTool | AllowedTools | None = None,
    parallel_tool_calls: bool | None = None,
) -> Offer | None:
    """The tools of a request; None when there are none. Raises ApiError for what cannot be done with them."""
    functions = [
        Function(f.name, f.description, f.parameters, bool(f.strict)) for f in (t.function for t in tools or ())
    ]
    return make_offer(
        functions,
        _choice_of(tool_choice, parallel_tool_calls is not False),
        template=model.chat_template,
        tokenizer=model.tokenizer,
        parser=model.tool_call_parser,
    )


def _choice_of(asked: Mode | NamedTool | AllowedTools | None, several: bool) -> Choice:
    if isinstance(asked, NamedTool):
        return Choice("required", (asked.function.name,), several=False)
    if isinstance(asked, AllowedTools):
        allowed = asked.allowed_tools
        return Choice(allowed.mode, tuple(tool.function.name for tool in allowed.tools), several)
    return Choice(asked or "auto", None, several)


def chat_prompt(
    model: Model,
    messages: Sequence[Message],
    offer: Offer | None,
    add_generation_prompt: bool | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[int]:
    """The ids of a request's conversation; see `conversation_prompt`."""
    said = [_for_template(message) for message in messages]
    return conversation_prompt(
        model, said, offer, add_generation_prompt is not False, chat_template_kwargs, param="messages"
    )


def conversation_prompt(
    model: Model,
    messages: Sequence[dict[str, Any]],
    offer: Offer | None,
    answering: bool,
    chat_template_kwargs: Mapping[str, Any] | None,
    *,
    param: str,
) -> list[int]:
    """The ids of a conversation, which the request calls `param`.

    Raises RequestError where the template refuses it, or there is none, and ApiError where it is far too long.
    """
    if model.chat_template is None:
        raise RequestError(
            f"The model {model.names[0]} has no chat template.",
            "Start the server with --chat-template FILE, or use /v1/completions.",
            param=param,
        )
    template = model.chat_template
    said, shown = for_template(template, messages, offer)
    if sum(map(_characters, said)) + len(str(shown)) > _LONG:
        text = template.render(said, shown, answering, chat_template_kwargs=chat_template_kwargs)
        model.refuse_too_long(text, param)
    return template.encode(said, shown, answering, chat_template_kwargs=chat_template_kwargs)


def _characters(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    said = sum(len(str(part)) for part in content) if isinstance(content, list) else len(content or "")
    return said + len(str(message.get("tool_calls", "")))


def _for_template(message: Message) -> dict[str, Any]:
    """A message as templates know it: `developer` is OpenAI's newer name for `system`."""
    fields = message.model_dump(exclude_none=True)
    return {**fields, "role": "system"} if message.role == "developer" else fields


def _top_logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs is not None and not request.logprobs:
        raise refused("top_logprobs needs logprobs. Set logprobs to true, or leave both out.", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None
