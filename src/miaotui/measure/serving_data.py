"""What is sent to a server under measurement: random texts of exact lengths, prompts of a file, or conversations."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from miaotui.checkpoint import look
from miaotui.checkpoint.hub import Listing
from miaotui.errors import UsageError
from miaotui.model.tokenizer import Tokenizer

CUSTOM_OUTPUT_LEN = 256
"""New tokens for a prompt of a file that says nothing about them, as vLLM has it."""
_TRIES = 24

WORDS = """
able about above across act add after again air all also animal answer any appear area ask back base bed before began
behind best better between big bird black blue boat body book both bottom box boy bring brought build built busy call
came can car care carry case cause center certain change check child city class clear close cold color come common
complete contain correct could count country course cover cross cry current cut dark day decide deep did differ direct
distance do does dog done door down draw drive dry during each early earth ease east eat end enough even ever every
example eye face fact fall family far farm fast father feel feet few field figure fill final find fine fire first fish
five floor fly follow food foot force form found four free friend from front full game gave general get girl give gold
good govern great green ground group grow had half hand happen hard has have head hear heard heart heat heavy help her
here high him his hold home horse hot hour house how hundred idea inch interest island just keep kind king knew know
land language large last late laugh lay lead learn leave left less letter life light like line list listen little live
long look love low machine made main make man many map mark may mean measure men might mile mind minute miss money month
moon more morning most mother mountain move much music must name near need never new next night north note notice noun
now number object off often oil old once one only open order other our out over own page paper part pass past pattern
people perhaps person picture piece place plain plan plane plant play point port pose possible pound power present press
problem produce product pull put question quick rain ran reach read ready real reason record red remember rest right
river road rock room round rule run said same saw say school science sea second see seem self sentence serve set several
""".split()  # noqa: SIM905 - as a list it would be four screens
"""Short English words, most of them one token of any vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Which prompts. `path` is of `custom` and `sharegpt`; lengths are in tokens.

    `output_len` None leaves the length of an answer to the file: `output_tokens` of a line, or the answer there.
    """

    name: Literal["random", "custom", "sharegpt"] = "random"
    path: Path | None = None
    input_len: int = 1024
    output_len: int | None = None
    range_ratio: float = 0.0
    """Random lengths are uniform in [length·(1 − ratio), length·(1 + ratio)]."""


@dataclass(frozen=True)
class Sample:
    """One request to send: a text or a chat's messages. `prompt_tokens` as counted here, None where it was not."""

    prompt: str | list[dict[str, Any]]
    prompt_tokens: int | None
    output_tokens: int


class Counter(Protocol):
    """Counts a prompt's tokens as the server will."""

    async def count(self, text: str) -> int: ...


class LocalTokenizer:
    """Counts with a tokenizer of this machine."""

    def __init__(self, name: str) -> None:
        """`name` is a model or a `tokenizer.json`. Raises UsageError for one that is not here."""
        self.tokenizer = _tokenizer(name)

    async def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, parse_special=True))

    def count_answer(self, text: str) -> int:
        """Tokens of a text that a model wrote."""
        return len(self.tokenizer.encode(text, add_special_tokens=False, parse_special=True))


def _tokenizer(name: str) -> Tokenizer:
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.name.endswith(".json") and file.is_file():
        import tokenizers

        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise UsageError(f"{file} is no tokenizer: {error}.", "Give a model, or its tokenizer.json.") from error
    found = look(name)
    if isinstance(found, Listing):
        hint = f"Run `miaotui pull {name}`, or give a tokenizer.json."
        raise UsageError(f"The tokenizer of {name} is not here.", hint)
    return Tokenizer.from_checkpoint(found)


async def samples(dataset: Dataset, count: int, seed: int, counter: Counter | None, *, chat: bool) -> list[Sample]:
    """`count` requests, the same for the same seed. Without a counter, words stand for tokens.

    A file with too few is gone through again, in random order, as vLLM does. Raises UsageError for an unusable file.
    """
    if dataset.name == "random":
        return await _random(dataset, count, seed, counter)
    assert dataset.path is not None
    shuffled = random.Random(seed)
    lines = list(_custom(dataset, chat=chat)) if dataset.name == "custom" else _sharegpt(dataset.path)
    shuffled.shuffle(lines)
    if dataset.name == "custom":
        found = [Sample(prompt, None, tokens) for prompt, tokens in lines[:count]]
    else:
        found = await _conversations(lines, dataset, count, counter)
    if not found:
        raise UsageError(f"{dataset.path} has no prompt to send.", "Give a file with prompts, one on each line.")
    return found + shuffled.choices(found, k=count - len(found))


# -- random --------------------------------------------------------------------------------------------------
async def _random(dataset: Dataset, count: int, seed: int, counter: Counter | None) -> list[Sample]:
    lengths = random.Random(seed)
    low, high = bounds(dataset.input_len, dataset.range_ratio)
    least, most = bounds(128 if dataset.output_len is None else dataset.output_len, dataset.range_ratio)
    pairs = [(lengths.randint(low, high), lengths.randint(least, most)) for _ in range(count)]

    async def one(i: int, tokens: int, new: int) -> Sample:
        source = random.Random(f"{seed} {i}")
        if counter is None:
            return Sample(" ".join(source.choices(WORDS, k=tokens)), None, new)
        return Sample(*await random_text(counter, tokens, source), new)

    return await asyncio.gather(*(one(i, tokens, new) for i, (tokens, new) in enumerate(pairs)))


def bounds(length: int, ratio: float) -> tuple[int, int]:
    """The least and the greatest length, at least 1."""
    return max(1, math.floor(length * (1 - ratio))), max(1, math.ceil(length * (1 + ratio)))


async def random_text(counter: Counter, tokens: int, source: random.Random) -> tuple[str, int]:
    """Random words of exactly `tokens` tokens, and how many they are in truth: what marks a text's beginning counts.

    Nearly always the first try is right. Where words are several tokens, their number is corrected by their mean
    length and the rest filled up by letters; after `_TRIES` the text stays as it is.
    """
    words = source.choices(WORDS, k=tokens)
    for _ in range(_TRIES):
        count = await counter.count(" ".join(words))
        if count == tokens or (count > tokens and len(words) == 1 and len(words[0]) == 1):
            break
        if count > tokens:
            kept = min(len(words) - 1, len(words) * tokens // count)
            words = words[:kept] or [words[0][: max(1, len(words[0]) // 2)]]
        elif more := (tokens - count) * len(words) // count:
            words += source.choices(WORDS, k=more)
        else:
            words[-1] += source.choice("abcdefgh")
    return " ".join(words), count


# -- files ---------------------------------------------------------------------------------------------------
def _custom(dataset: Dataset, *, chat: bool) -> Iterator[tuple[Any, int]]:
    """Prompts of a JSONL file, each with the tokens to ask for."""
    assert dataset.path is not None
    for number, line in enumerate(_read(dataset.path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"Line {number} of {dataset.path}"
        record = _json(line, where)
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not (isinstance(prompt, str) or (chat and isinstance(prompt, list))):
            kinds = "a text, or a chat's messages" if chat else "a text (messages are for --backend openai-chat)"
            raise UsageError(f"{where} has no prompt that can be sent.", f'Write {{"prompt": …}} with {kinds}.')
        own = record.get("output_tokens", CUSTOM_OUTPUT_LEN)
        if not isinstance(own, int) or own < 1:
            raise UsageError(f"{where} has output_tokens {own!r}.", "Give a whole number from 1 on.")
        yield prompt, own if dataset.output_len is None else dataset.output_len


def _sharegpt(path: Path) -> list[Any]:
    """First question and first answer of each conversation."""
    records = _json(_read(path), str(path))
    try:
        turns = [record["conversations"][:2] for record in records if len(record.get("conversations", ())) >= 2]
        return [(str(question["value"]), str(answer["value"])) for question, answer in turns]
    except (AttributeError, LookupError, TypeError) as error:
        hint = 'It is a list of {"conversations": [{"value": …}, {"value": …}]}.'
        raise UsageError(f"{path} is not in ShareGPT's form.", hint) from error


async def _conversations(lines: list[Any], dataset: Dataset, count: int, counter: Counter | None) -> list[Sample]:
    """Those that are neither very short nor very long, by the bounds of vLLM's benchmark."""
    found: list[Sample] = []
    for question, answer in lines:
        if len(found) == count:
            break
        prompt = await _tokens(question, counter)
        wanted = await _tokens(answer, counter) if dataset.output_len is None else dataset.output_len
        long_enough = prompt >= 4 and (wanted >= 4 or dataset.output_len is not None)
        if long_enough and prompt <= 1024 and prompt + wanted <= 2048:
            found.append(Sample(question, prompt if counter else None, wanted))
    return found


async def _tokens(text: str, counter: Counter | None) -> int:
    """Tokens of a text; without a counter about that many."""
    return max(len(text.split()), len(text) // 4) if counter is None else await counter.count(text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "Check --dataset-path.") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}.", "Mend the file, or choose another --dataset-name.") from None
