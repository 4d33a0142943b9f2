"""Requests as OpenAI's clients send them, with vLLM's extras. A field that is not here is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from miaotui.serve.openai.errors import ApiError, refused

MAX_STOPS = 64
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
MAX_TOOLS = 128
MAX_LOGPROBS = 20
"""Likeliest tokens told beside each chosen one."""

_UNKNOWN = "unknown_field"

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
"""Whether the model has them is checked later. The first wrong one is reported, and not a million of them."""


class Strict(BaseModel):
    """Nothing is converted, and nothing unknown is let through."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        """Refuse the first unknown field before anything else, so that a million of them are not collected."""
        if isinstance(data, Mapping):
            known = {field.alias or name for name, field in cls.__pydantic_fields__.items()}
            unknown = next((name for name in data if name not in known), None)
            if unknown is not None:
                raise PydanticCustomError(_UNKNOWN, "Unknown parameter", {"name": str(unknown)[:80]})
        return data


class Open(BaseModel):
    """A part that chat templates read, which may have fields of their own."""

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Strict):
    """vLLM's extra: exactly one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class JsonSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampled(Strict):
    """What chat and completions have in common. `user` names who asks and changes nothing."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # vLLM's extras
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


class Message(Open):
    role: str
    content: str | list[dict[str, Any]] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedSet(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    """A part of the tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet


class ChatRequest(Sampled):
    """A conversation to answer."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    # vLLM's extras
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Prompts = Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(Sampled):
    """Prompts to continue. `echo` with `max_tokens` 0 only scores them."""

    prompt: str | TokenIds | Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Strict):
    """A prompt, or a conversation, whose ids are wanted."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Ids whose text is wanted."""

    model: str | None = None
    tokens: TokenIds


T = TypeVar("T", bound=BaseModel)


def validate(kind: type[T], body: Mapping[str, Any]) -> T:
    """A request's body as `kind`. Raises ApiError 400 that names the first parameter at fault."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """OpenAI's answer to a wrong parameter: `messages[0].role`. Of a union's branches, the one that got furthest."""
    errors = error.errors(include_url=False, include_input=False)
    same = [found for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    deepest = max(same, key=lambda found: len(found["loc"]))
    param = _param(deepest["loc"])
    if deepest["type"] == _UNKNOWN:
        param = ".".join(filter(None, (param, deepest["ctx"]["name"])))
        return refused(f"Unknown or unsupported parameter: {param}. Leave it out.", param, "unsupported_parameter")
    if deepest["type"] == "missing":
        return refused(f"The parameter {param} is missing.", param, "missing_required_parameter")
    what = " or ".join(dict.fromkeys(found["msg"] for found in same if _param(found["loc"]) == param))
    return refused(f"The parameter {param} is wrong: {what}.", param or None, "invalid_value")


def _param(loc: Sequence[int | str]) -> str:
    param = ""
    for part in loc:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not _is_branch(part):
            param += f".{part}" if param else part
    return param


def _is_branch(part: str) -> bool:
    """Whether part of an error's place names the branch of a union, and no field."""
    return part in ("str", "NamedTool", "AllowedTools") or "[" in part
