"""Retrieval from a long context, made here and downloaded from nowhere: one sentence with a number, hidden in others.

For each length and each depth a text of that many tokens is made of sentences that hold no number; in it, so deep,
stands `The secret number of Lisbon is 48213.`, and at its end the question. Two figures for each text: whether the
greedy answer begins with the number, and the mean -log p of the number's tokens, which tells models apart that both
fail, or both succeed. (After Kamradt 2023, "Needle in a haystack".)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miaotui.errors import UsageError
from miaotui.measure import intervals
from miaotui.measure.quality_data import Ids, Window
from miaotui.measure.scoring import Listening, Opened, Rows, Settings
from miaotui.model.families import read_spec

DEPTHS = (0.05, 0.275, 0.5, 0.725, 0.95)
LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Tokens; those that the model reaches."""
SEED = 20240229

PLACES = ("Lisbon", "Oslo", "Kyoto", "Quito", "Accra", "Perth", "Turin", "Lima", "Hanoi", "Tunis", "Riga", "Cairo")
SUBJECTS = ("The gardener", "A quiet student", "My neighbour", "The old captain", "Her brother", "The baker")
VERBS = ("walked along", "painted", "remembered", "described", "left", "looked for", "wrote about")
OBJECTS = ("the river", "a blue door", "the empty station", "an apple tree", "the long road", "a letter", "the harbour")
TIMES = ("in the morning", "after the rain", "before dinner", "on a cold day", "without a word", "late in autumn")


@dataclass(frozen=True, eq=False)
class Text:
    """`prompt` ends where the number is to come; `number` are its tokens."""

    length: int
    depth: float
    prompt: Ids
    number: Ids


def texts(opened: Opened, lengths: Sequence[int]) -> list[Text]:
    """One for each length and depth, always the same."""
    return [_text(opened, length, depth) for length in lengths for depth in DEPTHS]


def lengths_of(opened: Opened) -> list[int]:
    """Those of LENGTHS that the model reaches. Raises UsageError where it reaches none."""
    most = read_spec(opened.checkpoint)[0].max_position
    found = [length for length in LENGTHS if length <= most]
    if not found:
        raise UsageError(
            f"{opened.model} reads {most} tokens, and a needle is hidden in {LENGTHS[0]}.", "Leave it out."
        )
    return found


def run(
    model: str, settings: Settings, tell: Callable[[int, int], None], lengths: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """For each text its `length` and `depth`, whether it was `found`, and the number's mean `nll`."""
    opened = Opened.of(model)
    wanted = texts(opened, lengths or lengths_of(opened))
    scorer = opened.load(settings, max(len(text.prompt) + len(text.number) for text in wanted), 1)
    results = []
    try:
        with Rows(settings.threads) as rows:
            for done, text in enumerate(wanted, 1):
                whole = Window(np.concatenate([text.prompt, text.number]), len(text.prompt))
                said = Listening(scorer)
                nll = float(rows.nll(said, whole).mean())
                found = bool(np.array_equal(said.likeliest, text.number))
                results.append({"length": text.length, "depth": text.depth, "found": found, "nll": nll})
                tell(done, len(wanted))
    finally:
        scorer.close()
    return results


def score(results: Sequence[dict[str, Any]]) -> intervals.Estimate:
    """The share of texts in which the number was found."""
    return intervals.mean([np.array([float(one["found"])]) for one in results])


# -- inside ------------------------------------------------------------------------------------------------
def _text(opened: Opened, length: int, depth: float) -> Text:
    chance = random.Random(f"{SEED} {length} {depth}")
    place, number = chance.choice(PLACES), f"{chance.randrange(10_000, 100_000)}"
    needle = f"The secret number of {place} is {number}."
    question = f"\n\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of {place} is"
    encode = opened.tokenizer.encode
    answer = np.array(encode(f" {number}", add_special_tokens=False), np.int32)
    room = length - len(encode(question, add_special_tokens=False)) - len(answer) - 2
    sentences: list[str] = []
    size = len(encode(needle, add_special_tokens=False))
    while True:
        sentence = _sentence(chance)
        size += len(encode(f" {sentence}", add_special_tokens=False))
        if size > room:
            break
        sentences.append(sentence)
    sentences.insert(round(depth * len(sentences)), needle)
    prompt = encode(" ".join(sentences) + question)
    return Text(length, depth, np.array(prompt, np.int32), answer)


def _sentence(chance: random.Random) -> str:
    return f"{' '.join(chance.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, TIMES))}."
