"""More text from what there is: changed copies of documents, by name, the same for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from miaotui.compress.text.sources import Row

Augmentation = Callable[[str, random.Random], str]

_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+|(?<=[。！？])|\n+")


def _lowercase(text: str, chance: random.Random) -> str:
    return text.lower()


def _no_punctuation(text: str, chance: random.Random) -> str:
    """As it is typed in haste: no punctuation at the ends of words."""
    return re.sub(r"(?<=\w)[.,;:!?]+(?=\s|$)|[。，；：！？、]", "", text)


def _shuffle_sentences(text: str, chance: random.Random) -> str:
    """The sentences of each line in another order."""
    return "".join(_shuffled_line(line, chance) if line.strip() else line for line in re.split(r"(\n+)", text))


def _shuffled_line(line: str, chance: random.Random) -> str:
    pairs = re.findall(r"(.*?(?:[.!?](?=[ \t])|[。！？]|$))([ \t]*)", line)
    sentences = [sentence for sentence, _ in pairs if sentence]
    gaps = [gap for sentence, gap in pairs if sentence]
    keys = [chance.random() for _ in sentences]
    order = sorted(range(len(sentences)), key=keys.__getitem__)
    return "".join(sentences[at] + gap for at, gap in zip(order, gaps, strict=True))


def _crop(text: str, chance: random.Random) -> str:
    """What lies between the start of a sentence in the first half and the end of one in the second."""
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    middle = len(text) / 2
    starts, ends = [at for at in cuts if at <= middle], [at for at in cuts if at > middle]
    if not ends:
        return text
    return text[starts[int(chance.random() * len(starts))] : ends[int(chance.random() * len(ends))]]


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "lowercase": _lowercase,
    "no-punctuation": _no_punctuation,
    "shuffle-sentences": _shuffle_sentences,
    "crop": _crop,
}
"""Each adds a changed copy of every document; of a conversation, the contents of its messages are changed."""


def augmented(documents: Sequence[Row], names: Sequence[str], seed: int) -> Iterator[Row]:
    """The documents, then for each name their changed copies, but for those that the change leaves as they were."""
    yield from documents
    for name in names:
        chance = random.Random(f"{name} {seed}")
        for row in documents:
            changed = _changed(row, AUGMENTATIONS[name], chance)
            if (changed.whole, changed.messages) != (row.whole, row.messages):
                yield replace(changed, continues=False)


def _changed(row: Row, change: Augmentation, chance: random.Random) -> Row:
    if row.messages is None:
        return replace(row, text=change(row.whole, chance), completion=None)
    messages = [
        {**message, "content": change(message["content"], chance)}
        if isinstance(message.get("content"), str)
        else message
        for message in row.messages
    ]
    return replace(row, messages=messages)
