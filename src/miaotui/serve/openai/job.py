"""A request that has been understood: what the engine is to run, and how its outputs are told."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from miaotui.engine.engine import Engine
from miaotui.engine.params import SamplingParams
from miaotui.engine.request import RequestOutput
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer
from miaotui.serve.openai.errors import ApiError, no_such_model, refused
from miaotui.serve.openai.response_store import ResponseStore

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, eq=False)
class Model:
    """What requests are understood with."""

    names: tuple[str, ...]
    engine: Engine
    """Asked only for what any thread may ask of it: `check`, and its configuration."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    tool_call_parser: str | None = None
    responses: ResponseStore = field(default_factory=ResponseStore)

    def encode(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text that is the model's own input: the text of a special token in it is that token.

        Raises ApiError, before it is encoded, for a text that is far too long for the context.
        """
        self.refuse_too_long(text, param)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special=True)

    def refuse_too_long(self, text: str, param: str) -> None:
        """Encoding megabytes takes seconds and a hundred times their memory, only to be refused for their length."""
        least, most = self.tokenizer.least_tokens(text), self.engine.config.max_model_len
        if least > most:
            message = f"The prompt has more than {least} tokens, but the context holds {most}. Shorten it."
            raise refused(message, param, "context_length_exceeded")

    def name(self, asked: str | None) -> str:
        """The name to answer under. Raises ApiError 404 for a model that is not this one."""
        if asked is not None and asked not in self.names:
            raise no_such_model(asked, self.names)
        return asked or self.names[0]


class Job(Protocol):
    """One request. It is asked either for `answer`, or for `chunks` as outputs come and then `closing`."""

    params: SamplingParams
    priority: int
    stream: bool

    @property
    def aliases(self) -> Mapping[str, str]:
        """What the endpoint calls parameters of the engine: `max_completion_tokens` for `max_tokens`."""
        ...

    @property
    def prompts(self) -> Sequence[list[int]]:
        """Token ids. Each becomes a request of the engine, with `params`."""
        ...

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer, from the finished output of each prompt."""
        ...

    def chunks(self, prompt: int, output: RequestOutput) -> bytes:
        """Events on the wire for what a step has added to the prompt of that index; may be none."""
        ...

    def closing(self) -> bytes:
        """The last events, after all outputs."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The last events, where the request has failed after it was begun."""
        ...


@dataclass(slots=True)
class Usage:
    """Tokens of a request's prompts and answers."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> Usage:
        """Of finished outputs."""
        usage = cls()
        for output in outputs:
            usage.add_prompt(output)
            usage.completion += sum(len(choice.token_ids) for choice in output.outputs)
        return usage

    def add_prompt(self, output: RequestOutput) -> None:
        self.prompt += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """A stream's end by an error, as OpenAI's clients know it."""
    return event(error.body()) + DONE


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())
