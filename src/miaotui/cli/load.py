"""Loading a model for a command that answers."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM


def load(model: str, options: dict[str, Any]) -> LLM:
    """`LLM(model, **options)`, with the garbage collector out of the way.

    Loading makes some hundred thousand objects that all stay (vocabulary, merges, modules). Looking through them over
    and over costs a fifth of the time to the first token; afterwards they are set aside, so that no collection
    between two tokens has to walk them.
    """
    gc.disable()
    try:
        from miaotui.engine.llm import LLM

        return LLM(model, **options)
    finally:
        gc.freeze()
        gc.enable()


def load_for_chat(model: str, options: dict[str, Any], chat_template: str | None) -> LLM:
    """`load`, with another chat template, a file or the template itself, when one is asked for."""
    llm = load(model, options)
    if chat_template is not None:
        from miaotui.model.chat import ChatTemplate, read_template

        llm.chat_template = ChatTemplate(read_template(chat_template), llm.tokenizer)
    return llm
