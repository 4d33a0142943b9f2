"""`/tokenize` and `/detokenize`, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miaotui.engine.admit import check_prompt
from miaotui.engine.text import decode
from miaotui.serve.openai.chat import chat_prompt, offer_of
from miaotui.serve.openai.errors import refused
from miaotui.serve.openai.job import Model
from miaotui.serve.openai.sampling import renamed
from miaotui.serve.openai.schemas import DetokenizeRequest, TokenizeRequest, validate

_FOR_MESSAGES = ("tools", "add_generation_prompt", "chat_template_kwargs")


def tokenize(model: Model, body: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that a prompt or a conversation becomes."""
    request = validate(TokenizeRequest, body)
    model.name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise refused("Give either prompt or messages.", "prompt", "missing_required_parameter")
    if request.messages is None:
        unused = next((name for name in _FOR_MESSAGES if getattr(request, name) is not None), None)
        if unused is not None:
            raise refused(f"{unused} is for messages only. Leave it out.", unused)
        with_ends = request.add_special_tokens is not False
        ids = model.encode(request.prompt or "", "prompt", add_special_tokens=with_ends)
    elif request.add_special_tokens:
        raise refused("The chat template adds its own special tokens. Leave it out.", "add_special_tokens")
    else:
        offer = offer_of(model, request.tools)
        ids = chat_prompt(model, request.messages, offer, request.add_generation_prompt, request.chat_template_kwargs)
    strings = [model.tokenizer.backend.id_to_token(i) for i in ids] if request.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": model.engine.config.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


def detokenize(model: Model, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of ids, special tokens included."""
    request = validate(DetokenizeRequest, body)
    model.name(request.model)
    if request.tokens:
        with renamed({"prompt": "tokens"}):
            check_prompt(request.tokens, model.engine.executor.vocab_size)
    return {"prompt": decode(model.tokenizer, request.tokens, skip_special_tokens=False)}
