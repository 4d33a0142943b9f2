"""A sequence's text as it grows: decoded piece by piece, watched for stop strings."""

from __future__ import annotations

from collections.abc import Sequence as Many

from miaotui.engine.params import SamplingParams
from miaotui.model.detokenizer import IncrementalDetokenizer, StopChecker
from miaotui.model.tokenizer import Tokenizer


class TextTail:
    """Text on its way out; what could be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._checker = StopChecker(params.stops, params.include_stop_str_in_output)
        self.stopped_by: str | None = None

    def push(self, ids: Many[int], *, watch: bool = True) -> str:
        """Text that is safe to show now. With `watch`, a stop string that it completes sets `stopped_by`."""
        return self._check(self._detokenizer.push(ids), watch)

    def flush(self, *, watch: bool = True) -> str:
        """The rest, once no token will follow. The last of it may still complete a stop string."""
        text = self._check(self._detokenizer.flush(), watch)
        return text if self.stopped_by is not None else text + self._checker.flush()

    def _check(self, text: str, watch: bool) -> str:
        if not watch:
            return text
        text, self.stopped_by = self._checker.push(text)
        return text


def decode(tokenizer: Tokenizer, ids: Many[int], *, skip_special_tokens: bool) -> str:
    """A whole text, the same as its pieces joined."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    return detokenizer.push(ids) + detokenizer.flush()
