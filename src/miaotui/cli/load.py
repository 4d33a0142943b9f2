"""Loading a model for a command that answers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM


def load(model: str, options: dict[str, Any]) -> LLM:
    """`LLM(model, **options)` as the model is best served, with the garbage collector out of the way.

    Loading makes some hundred thousand objects that all stay (vocabulary, merges, modules). Looking through them over
    and over costs a fifth of the time to the first token; afterwards they are set aside, so that no collection
    between two tokens has to walk them.
    """
    gc.disable()
    try:
        from miaotui.engine.llm import LLM

        return LLM(model, **as_served(model, options))
    finally:
        gc.freeze()
        gc.enable()


def as_served(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of LLM, and where they say nothing what `miaotui accelerate` recommended beside the model.

    `speculative` none stands for guessing nothing, whatever is recommended.
    """
    path = Path(model).expanduser()
    found = options
    if path.exists():
        from miaotui.checkpoint import serving
        from miaotui.hardware.detect import usable_cores

        found = {**serving.read(path, usable_cores()), **options}
    return {name: value for name, value in found.items() if (name, value) != ("speculative", "none")}


def load_for_chat(model: str, options: dict[str, Any], chat_template: str | None) -> LLM:
    """`load`, with another chat template, a file or the template itself, when one is asked for."""
    llm = load(model, options)
    if chat_template is not None:
        from miaotui.model.chat import ChatTemplate, read_template

        llm.chat_template = ChatTemplate(read_template(chat_template), llm.tokenizer)
    return llm
