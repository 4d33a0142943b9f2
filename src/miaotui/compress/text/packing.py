"""Documents to one run of token ids, laid end to end.

Between two texts stands the end of text where the tokenizer has one, and an empty line where it has none; after a
conversation nothing, for its template ends it. As in `miaotui evaluate` and in transformers, the text of a special
token in a text is that token; in a message it stays text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from miaotui.compress.text.sources import Fault, Faulty, Row
from miaotui.errors import MiaotuiError, RequestError, UsageError
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer

Ids = NDArray[np.int32]

Write = Callable[[int, int, int], Ids | Sequence[Sequence[int]]]
"""`write(count, length, seed)`: the model's own text, drawn at random (not greedily) after BOS, or after the end of a
text where it has no BOS, and past the ends of texts. Gives `count` runs of `length` token ids each, without the BOS.
The same arguments give the same ids."""


def head(tokenizer: Tokenizer) -> list[int]:
    """What a window begins with: BOS, where the tokenizer itself puts one before a text."""
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


class Packer:
    """Lays documents end to end. `chat_template` is needed for conversations only."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._between = list(tokenizer.eos_ids[:1]) or self._encode("\n\n")

    def stream(self, documents: Iterable[Row], faulty: Faulty) -> Ids:
        """The ids of all documents, one-dimensional; `faulty` is told of a conversation that the template refuses.

        Raises UsageError for a conversation where there is no template.
        """
        ids = array("i")
        open_end = False  # whether the last document was a text, which nothing has ended yet
        for row in documents:
            try:
                found = self._ids(row)
            except RequestError as error:
                faulty(Fault(row.where, error.message.rstrip(".")))
                continue
            if open_end and not row.continues and ids[-1] not in self._tokenizer.eos_ids:
                ids.extend(self._between)
            ids.extend(found)
            open_end = row.messages is None and len(ids) > 0
        return np.array(ids, dtype=np.int32)

    def _ids(self, row: Row) -> list[int]:
        if row.messages is None:
            return self._encode(row.whole)
        if self._chat_template is None:
            raise UsageError(
                f"{row.where} is a conversation, and the model has no chat template.",
                "Give rows of text, or a model with a chat template.",
            )
        ids = self._chat_template.encode(row.messages, add_generation_prompt=False)
        starts_twice = self._tokenizer.add_bos and ids[:1] == [self._tokenizer.bos_id]
        return ids[1:] if starts_twice else ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def own_text(write: Write | None, count: int, length: int, seed: int, vocabulary: int) -> Ids:
    """`[count × length]` ids that the model wrote.

    Raises UsageError without `write`, MiaotuiError where it gives another shape or ids of another vocabulary.
    """
    if write is None:
        raise UsageError("Nothing is there that could write the model's own text.", "Give the calibration a file.")
    runs = write(count, length, seed)
    if len(runs) != count or any(len(run) != length for run in runs):
        raise MiaotuiError("The model wrote less than it was asked for.", "Give the calibration a file.")
    ids = np.array(runs, dtype=np.int64)
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise MiaotuiError("The model wrote tokens that its tokenizer lacks.", "Use the tokenizer that belongs to it.")
    return ids.astype(np.int32).reshape(-1)
