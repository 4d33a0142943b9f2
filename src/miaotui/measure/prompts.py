"""Prompts cut from text: what follows them is what is asked in earnest, not what follows random tokens.

It matters where speed depends on what is said: guessed tokens, the greedy screen, experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from miaotui.measure.quality_data import read_data

MOST = 400_000
"""Characters of the text, about a quarter as many tokens: tokenised in half a second."""


def prose(encode: Callable[[str], list[int]]) -> list[int]:
    """Tokens of the English prose that CPython carries."""
    (text,) = read_data(None).documents
    assert isinstance(text, str)
    return encode(text[:MOST])


def cut(text: Sequence[int], tokens: int, random: np.random.Generator) -> list[int]:
    """So many tokens from a random place on; from the beginning again where the text ends."""
    at = int(random.integers(0, len(text)))
    piece = list(text[at : at + tokens])
    while len(piece) < tokens:
        piece += text[: tokens - len(piece)]
    return piece
