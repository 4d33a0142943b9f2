"""Miaotui (秒推): language models answered from the machine you have.

    from miaotui import LLM, SamplingParams
    LLM("demo").generate("Hello", SamplingParams(max_tokens=16))

Importing the package imports nothing heavy: the names below are fetched when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM
    from miaotui.engine.params import BeamSearchParams, SamplingParams, StructuredOutputs
    from miaotui.engine.request import RequestOutput

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchParams", "RequestOutput", "SamplingParams", "StructuredOutputs", "__version__"]

_HOMES = {
    "LLM": "miaotui.engine.llm",
    "BeamSearchParams": "miaotui.engine.params",
    "RequestOutput": "miaotui.engine.request",
    "SamplingParams": "miaotui.engine.params",
    "StructuredOutputs": "miaotui.engine.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'miaotui' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
