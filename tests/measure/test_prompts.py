"""Prompts cut from text."""

from __future__ import annotations

import numpy as np
import pytest

from miaotui.measure import prompts


@pytest.mark.parametrize("tokens", [1, 7, 10, 25])
def test_a_piece_is_as_long_as_asked_and_goes_on_from_the_beginning(tokens: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        piece = prompts.cut(range(10), tokens, random)
        assert piece == [(piece[0] + i) % 10 for i in range(tokens)]


def test_pieces_begin_everywhere() -> None:
    random = np.random.default_rng(0)
    assert {prompts.cut(range(10), 2, random)[0] for _ in range(200)} == set(range(10))


def test_prose_is_what_python_carries() -> None:
    text = "".join(map(chr, prompts.prose(lambda text: list(map(ord, text)))))
    assert len(text) == prompts.MOST
    assert "The operator module" in text or "statement" in text
