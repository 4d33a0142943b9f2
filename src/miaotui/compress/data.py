"""Calibration data: from any text to windows of tokens, the same for the same seed.

    windows(tokenizer: Tokenizer, calibration: Calibration, *,
            chat_template: ChatTemplate | None = None, write: Write | None = None) -> CalibrationText
    CalibrationText(tokens: int32 [windows, window], source: str, fingerprint: str, counts: dict[str, int],
                    faults: tuple[str, ...])

read (`texts.rows`) → clean → each document once → a sample of what is large → augment → tokens → windows, drawn
without replacement from the whole.

The documents are laid end to end, with the end of text between them where the tokenizer has one and an empty line
where it has none, and cut into windows; a window begins with BOS where the tokenizer itself puts one before a text.
As in `miaotui evaluate` and in transformers, the text of a special token is that token.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.compress.augment import AUGMENTATIONS, augmented
from miaotui.compress.recipe import Calibration
from miaotui.compress.texts import Fault, Row, prose, prose_name, rows
from miaotui.errors import MiaotuiError, RequestError, UsageError
from miaotui.model.chat import ChatTemplate
from miaotui.model.tokenizer import Tokenizer

__all__ = ["AUGMENTATIONS", "CalibrationText", "Write", "clean", "windows"]

Write = Callable[[int, int, int], Iterable[Sequence[int]]]
"""`write(count, length, seed)`: the model's own texts, drawn at random (not greedily) after BOS, or after the end of a
text where it has no BOS. Gives `count` runs of at most `length` token ids each, without the BOS; a run may end with an
end of text and is then shorter. The same arguments give the same ids."""

Ids = NDArray[np.int32]

SELF = "self"
KEPT_CHARACTERS, KEPT_PER_TOKEN = 8 << 20, 16
"""Of a larger source, a sample of documents with so many characters (the greater of the two) is tokenised."""
GROWTH = 8
"""A sample that turned out to be too small is drawn again, so many times larger."""
NAMED_FAULTS = 5
ROUNDS = 8
"""How often the model is asked to write on, when its texts end early."""


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
    """The windows that `calibration` ask for.

    `chat_template` is needed where rows are conversations, `write` where the source is `self`.
    Raises UsageError for a source that cannot be read or used, for an unknown augmentation, and for too little text,
    with the number of windows that it gives.
    """
    _check_augmentations(calibration)
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    room = calibration.window - len(head)
    tally = _Tally()
    if calibration.source == SELF:
        name = "the model's own text"
        stream = _written(tokenizer, calibration, room, write, tally)
    else:
        name = prose_name() if calibration.source is None else calibration.source
        stream, tally = _read(_Packer(tokenizer, chat_template), calibration, room)
    available = len(stream) // room
    if available < calibration.windows:
        raise _too_little(name, calibration, available, tally)
    cut = stream[: available * room].reshape(available, room)[_drawn(available, calibration)]
    tokens = np.concatenate([np.tile(np.array(head, np.int32), (len(cut), 1)), cut], axis=1)
    counts = {**tally.counts(), "available": available}
    return CalibrationText(tokens, name, _fingerprint(tokens, calibration), counts, tuple(map(str, tally.faults)))


def _check_augmentations(calibration: Calibration) -> None:
    for name in calibration.augment:
        if name not in AUGMENTATIONS:
            raise UsageError(f"There is no augmentation {name!r:.60}.", f"Known are {', '.join(AUGMENTATIONS)}.")
    if calibration.augment and calibration.source == SELF:
        raise UsageError("What the model writes itself is not augmented.", "Leave out calibration.augment.")


def _drawn(available: int, calibration: Calibration) -> list[int]:
    """Indices of windows, without replacement. What the model wrote for this is taken as it comes."""
    if calibration.source == SELF:
        return list(range(calibration.windows))
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

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "faults"}


def _read(packer: _Packer, calibration: Calibration, room: int) -> tuple[Ids, _Tally]:
    """The tokens of the source, or of a sample of its documents that has enough of them."""
    most = max(KEPT_CHARACTERS, KEPT_PER_TOKEN * calibration.windows * room)
    while True:
        tally = _Tally()
        kept, all_kept = _sample(_documents(calibration.source, tally), most, calibration.seed)
        stream = packer.stream(augmented(kept, calibration.augment, calibration.seed), tally)
        if all_kept or len(stream) >= calibration.windows * room:
            return stream, tally
        most *= GROWTH


def _documents(source: str | None, tally: _Tally) -> Iterator[Row]:
    """Cleaned, none empty, each once."""
    found = prose() if source is None else rows(Path(source).expanduser(), tally.faulty)
    seen: set[bytes] = set()
    for row in found:
        tally.documents += 1
        document = _cleaned(row)
        content = _content(document)
        key = hashlib.blake2b(content.encode(), digest_size=16).digest()
        if not content.strip():
            tally.empty += 1
        elif key in seen:
            tally.duplicates += 1
        else:
            seen.add(key)
            yield document


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


# -- tokens ----------------------------------------------------------------------------------------------
class _Packer:
    """Lays documents end to end as token ids."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._between = list(tokenizer.eos_ids[:1]) or self._encode("\n\n")

    def stream(self, documents: Iterable[Row], tally: _Tally) -> Ids:
        """Ids of all documents. A conversation that the template refuses counts as malformed."""
        ids = array("i")
        for row in documents:
            try:
                found = self._ids(row)
            except RequestError as error:
                tally.documents -= 1
                tally.faulty(Fault(row.where, error.message.rstrip(".")))
                continue
            if ids and not row.continues and not _ends(ids, self._tokenizer.eos_ids):
                ids.extend(self._between)
            ids.extend(found)
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


def _ends(ids: Sequence[int], eos_ids: Sequence[int]) -> bool:
    return ids[-1] in eos_ids


def _written(tokenizer: Tokenizer, calibration: Calibration, room: int, write: Write | None, tally: _Tally) -> Ids:
    """Ids of the model's own texts, as many as are wanted; it is asked again where its texts end early."""
    if write is None:
        raise UsageError("Nothing is there that could write the model's own text.", "Give the calibration a file.")
    between = tokenizer.eos_ids[:1]
    ids, wanted = array("i"), calibration.windows * room
    for turn in range(ROUNDS):
        missing = -(-(wanted - len(ids)) // room)
        for run in write(missing, room, calibration.seed + turn):
            _check_ids(run, tokenizer)
            tally.documents += 1
            tally.empty += not len(run)
            if len(ids) % room and len(run) and not _ends(ids, tokenizer.eos_ids):
                ids.extend(between)
            ids.extend(run)
        if len(ids) >= wanted:
            break
    return np.array(ids, dtype=np.int32)


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    if len(ids) and not (min(ids) >= 0 and max(ids) < tokenizer.vocab_size):
        raise MiaotuiError("The model wrote tokens that its tokenizer lacks.", "Use the tokenizer that belongs to it.")
