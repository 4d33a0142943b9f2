"""Calibration data: from any text to windows of tokens, the same for the same seed.

    windows(tokenizer: Tokenizer, calibration: Calibration, *,
            chat_template: ChatTemplate | None = None, write: Write | None = None) -> CalibrationText
    CalibrationText(tokens: int32 [windows, window], source: str, fingerprint: str, counts: dict[str, int],
                    faults: tuple[str, ...])

read (`texts.rows`) → clean → each document once → a sample of what is large → augment → tokens → windows, drawn
without replacement from the whole.

A window begins with BOS where the tokenizer itself puts one before a text; `packing` says how documents follow one
another. With the source `self`, the model writes the windows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from miaotui.compress.recipe import Calibration
from miaotui.compress.text.augment import AUGMENTATIONS, augmented
from miaotui.compress.text.packing import Ids, Packer, Write, head, own_text
from miaotui.compress.text.sources import Fault, Row, prose, prose_name, rows
from miaotui.errors import UsageError
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer

__all__ = ["AUGMENTATIONS", "CalibrationText", "Write", "clean", "windows"]

SELF = "self"
KEPT_CHARACTERS, KEPT_PER_TOKEN = 8 << 20, 16
"""Of a larger source, a sample of documents with so many characters (the greater of the two) is tokenised."""
GROWTH = 8
"""A sample that turned out to be too small is drawn again, so many times larger."""
NAMED_FAULTS = 5


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """tokens: `[windows, window]` int32. source: what it was drawn from, for people.

    fingerprint: SHA-256 of the calibration and the token ids, but not of the path.
    counts: `documents` that were read, of which `empty` and `duplicates` were dropped; `malformed` rows, which are
    not among them; `available` windows that were there to draw from (of a large source: in the sample that was
    tokenised). faults: of the first malformed rows, where each is and what is wrong with it.
    """

    tokens: Ids
    source: str
    fingerprint: str
    counts: dict[str, int]
    faults: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """Everything but the tokens, for recipes and cards."""
        shape = {"windows": len(self.tokens), "window": self.tokens.shape[1]}
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            **shape,
            **self.counts,
            "faults": [*self.faults],
        }


def windows(
    tokenizer: Tokenizer,
    calibration: Calibration,
    *,
    chat_template: ChatTemplate | None = None,
    write: Write | None = None,
) -> CalibrationText:
    """The windows that `calibration` asks for.

    `chat_template` is needed where rows are conversations, `write` where the source is `self`.
    Raises UsageError for a source that cannot be read or used, for an unknown augmentation, and for too little text,
    with the number of windows that it gives.
    """
    _check_augmentations(calibration)
    first = head(tokenizer)
    room = calibration.window - len(first)
    if calibration.source == SELF:
        name, count = "the model's own text", calibration.windows
        tally = _Tally(documents=count)
        stream = own_text(write, count, room, calibration.seed, tokenizer.vocab_size)
    else:
        name = prose_name() if calibration.source is None else calibration.source
        stream, tally = _read(Packer(tokenizer, chat_template), calibration, room)
    available = len(stream) // room
    if available < calibration.windows:
        raise _too_little(name, calibration, available, tally)
    cut = stream[: available * room].reshape(available, room)[_drawn(available, calibration)]
    tokens = np.concatenate([np.tile(np.array(first, np.int32), (len(cut), 1)), cut], axis=1)
    counts = {**tally.counts(), "available": available}
    return CalibrationText(tokens, name, _fingerprint(tokens, calibration), counts, tuple(map(str, tally.faults)))


def _check_augmentations(calibration: Calibration) -> None:
    for name in calibration.augment:
        if name not in AUGMENTATIONS:
            raise UsageError(f"There is no augmentation {name!r:.60}.", f"Known are {', '.join(AUGMENTATIONS)}.")
    if len(set(calibration.augment)) < len(calibration.augment):
        raise UsageError("An augmentation is named twice.", "Name each once: the same copies teach nothing new.")
    if calibration.augment and calibration.source == SELF:
        raise UsageError("What the model writes itself is not augmented.", "Leave out calibration.augment.")


def _drawn(available: int, calibration: Calibration) -> list[int]:
    """Indices of windows, without replacement."""
    chance = random.Random(calibration.seed)  # of Python's generator, random() alone is the same in every version
    keys = [chance.random() for _ in range(available)]
    return sorted(range(available), key=keys.__getitem__)[: calibration.windows]


def _fingerprint(tokens: Ids, calibration: Calibration) -> str:
    plain = {name: value for name, value in asdict(calibration).items() if name != "source"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.hexdigest()


def _too_little(name: str, calibration: Calibration, available: int, tally: _Tally) -> UsageError:
    faults = f" ({tally.malformed} malformed rows, the first: {tally.faults[0]})" if tally.malformed else ""
    given = f"{name} gives {available} window{'' if available == 1 else 's'} of {calibration.window} tokens{faults}"
    fewer = f"ask for at most {available}" if available else "take a shorter window"
    return UsageError(f"{given}, and {calibration.windows} are wanted.", f"Give more text, or {fewer}.")


# -- reading ---------------------------------------------------------------------------------------------
@dataclass
class _Tally:
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    malformed: int = 0
    faults: list[Fault] = field(default_factory=list)

    def faulty(self, fault: Fault) -> None:
        self.malformed += 1
        if len(self.faults) < NAMED_FAULTS:
            self.faults.append(fault)

    def refused(self, fault: Fault) -> None:
        """A document that turned out to be malformed."""
        self.documents -= 1
        self.faulty(fault)

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "faults"}


def _read(packer: Packer, calibration: Calibration, room: int) -> tuple[Ids, _Tally]:
    """The tokens of the source, or of a sample of its documents that has enough of them."""
    most = max(KEPT_CHARACTERS, KEPT_PER_TOKEN * calibration.windows * room)
    while True:
        tally = _Tally()
        kept, all_kept = _sample(_documents(calibration.source, tally), most, calibration.seed)
        stream = packer.stream(augmented(kept, calibration.augment, calibration.seed), tally.refused)
        if all_kept or len(stream) >= calibration.windows * room:
            return stream, tally
        most *= GROWTH


def _documents(source: str | None, tally: _Tally) -> Iterator[Row]:
    """Cleaned, none empty, each once."""
    found = prose() if source is None else rows(Path(source).expanduser(), tally.faulty)
    seen: set[bytes] = set()
    whole = True  # nothing was left out since the row before
    for row in found:
        tally.documents += 1
        document = _cleaned(row)
        content = _content(document)
        key = hashlib.blake2b(content.encode(), digest_size=16).digest()
        if not content.strip():
            tally.empty += 1
            whole = False
        elif key in seen:
            tally.duplicates += 1
            whole = False
        else:
            seen.add(key)
            yield replace(document, continues=document.continues and whole)
            whole = True


def _sample(documents: Iterable[Row], most: int, seed: int) -> tuple[list[Row], bool]:
    """Documents of about `most` characters, each as likely as another, in their order; and whether it is all.

    Each is given a random key, and those with the least keys stay (Vitter 1985 gives the plain form, by number).
    """
    chance = random.Random(f"sample {seed}")
    heap: list[tuple[float, int, int, Row]] = []  # the greatest key first
    size, all_kept = 0, True
    for at, row in enumerate(documents):
        length = len(_content(row))
        heapq.heappush(heap, (-chance.random(), at, length, row))
        size += length
        while size - heap[0][2] >= most:
            size -= heapq.heappop(heap)[2]
            all_kept = False
    kept = sorted(heap, key=lambda item: item[1])
    before = [-2, *(at for _, at, _, _ in kept)]
    return [
        replace(row, continues=row.continues and at == last + 1)
        for (_, at, _, row), last in zip(kept, before, strict=False)
    ], all_kept


def _content(row: Row) -> str:
    return row.whole if row.messages is None else json.dumps(row.messages, ensure_ascii=False, default=str)


# -- cleaning --------------------------------------------------------------------------------------------
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")


def clean(text: str) -> str:
    """One kind of line end, no control characters but tab and line feed, no two empty lines in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _BLANK_LINES.sub("\n\n", _CONTROLS.sub("", text))


def _cleaned(row: Row) -> Row:
    messages = None if row.messages is None else [_cleaned_message(message) for message in row.messages]
    completion = None if row.completion is None else clean(row.completion)
    return replace(row, text=clean(row.text), completion=completion, messages=messages)


def _cleaned_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": clean(content)} if isinstance(content, str) else message
