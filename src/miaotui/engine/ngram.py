"""Prompt look-up: what followed the last tokens when they stood there before (Saxena 2023; the matching is LZ77's)."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from miaotui.engine.request import Sequence

_CANDIDATES = 8
"""Earlier places that are compared, the latest first."""


class Match(NamedTuple):
    length: int
    """Tokens before `position` that are the sequence's last ones too."""
    position: int


class History:
    """One sequence's tokens, indexed by pairs: where each pair ended last, and before that, and before that."""

    def __init__(self, tokens: array[int]) -> None:
        self._tokens = tokens
        self._last: dict[tuple[int, int], int] = {}
        self._before = array("i", [-1])
        """For each position that ends a pair, the position where that pair ended before; -1: nowhere."""

    def match(self, least: int, most: int) -> Match | None:
        """The longest match of at least `least` and at most `most` tokens, of equals the latest."""
        tokens = self._tokens
        end = len(tokens) - 1
        for position in range(len(self._before), end):
            pair = (tokens[position - 1], tokens[position])
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = position
        if end < least:
            return None
        place = self._last.get((tokens[end - 1], tokens[end]), -1)
        best = Match(least - 1, -1)
        for _ in range(_CANDIDATES):
            if place < 0:
                break
            length = 2
            while length < most and length <= place and tokens[place - length] == tokens[end - length]:
                length += 1
            if length > best.length:
                best = Match(length, place + 1)
            place = self._before[place]
        return best if best.position >= 0 else None


class NgramProposer:
    """Proposes what followed the longest repeated ending. Costs a few look-ups; knows no model."""

    cost = 0.0

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._histories: dict[Sequence, History] = {}
        self._matches: dict[Sequence, Match] = {}

    def offer(self, sequence: Sequence, longest: int) -> tuple[int, int] | None:
        """The length of the match, as the draft's kind, and how many tokens it gives; None without a match."""
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = History(sequence.tokens)
        match = history.match(self._least, self._most)
        if match is None:
            return None
        self._matches[sequence] = match
        return match.length, longest

    def propose(self, lengths: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts of these lengths for sequences that had an offer. A repetition goes on as it began."""
        drafts: dict[Sequence, list[int]] = {}
        for sequence, length in lengths.items():
            tokens, start = sequence.tokens, self._matches[sequence].position
            period = len(tokens) - start
            drafts[sequence] = [tokens[start + i % period] for i in range(length)]
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._histories.pop(sequence, None)
        self._matches.pop(sequence, None)

    def close(self) -> None:
        self._histories.clear()
