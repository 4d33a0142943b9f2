"""A tokenizer as GGUF metadata, checked against the original on text of many scripts before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.writing.gguf_config import Preview
from miaotui.errors import UnsupportedModelError
from miaotui.model.chat import find_chat_templates
from miaotui.model.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from miaotui.model.gguf_tokenizer import end_ids, pre_tokenizer_of
from miaotui.model.token_text import SPACE, Joining, byte_fallback_piece
from miaotui.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

FIRST_NAMES = ("llama-bpe", "smollm", "qwen2", "gpt-2", "tekken", "gpt-4o")
"""Of several names for one way to cut words: the one that most readers know."""

NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator",
         "pad_token": "padding"}  # fmt: skip
"""transformers' names for tokens, and GGUF's."""

PROBES = (
    "Hello world, it's 2024-05-06 and we'll pay $1,234.56! I'LL SAY SO; don't you think?",
    "  two spaces before,   three inside \t a tab\n\n\nlines\r\n\r\n   \n and the end  ",
    "def step(self, x):\n    return [i ** 2 for i in range(10)]  # sq\n\n\tif x <= 0:\n\t\traise ValueError('no')",
    "秒推让模型在一秒之内回答。你好，世界！日本語のテキストとカタカナ。한국어 문장도 있습니다.",
    "Ünïcödé naïve façade Straße ΑΒΓ αβγδε Привет мир שלום مرحبا نص عربي हिन्दी वाक्य ไทย",
    "👩‍👩‍👧‍👦 🎉🎉 emoji 👍🏽 flags 🇫🇷 and e\u0301 combining n\u0303 marks \u00a0nbsp \u200b \u3000 wide \u2028 line",
    '<table><tr><td>HTML</td></tr></table> {"json": [1, 22, 333, 4444, 55555]} $x^2 + y^2$ ~~ `code` | a|b // \\\\ ...',
    "CamelCaseWord HTTPServer XMLHttpRequest iPhone ABCdefGHI ½ ² Ⅷ ٣٤٥ 12345678901234567890 don'T 'S x'Re",
    "!!!??? ... --- ___ ### $$$ <=> |||| ~~~ `` [[]] {{}} (()) \x00 control \x01\x02 \x7f",
)
"""Text on which tokenizers that differ are likely to differ."""


def tokenizer_metadata(source: Checkpoint, arch: str, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.` keys for a folder's tokenizer, with ids filled up to the embedding's rows.

    Raises CheckpointError without a tokenizer, UnsupportedModelError for a kind that GGUF does not have.
    """
    tokenizer = Tokenizer.from_checkpoint(source)
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model["type"] != "BPE":
        _unsaid(f"is of the kind {model['type']}")
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    tokens, types = _tokens(tokenizer, model.get("unk_token"), vocab_size)
    if tokenizer.decoder_kind.joining is Joining.BYTE_LEVEL:
        made = _byte_level(tokenizer, merges, bool(model.get("ignore_merges")))
    else:
        made = _sentencepiece(tokenizer, tokens, merges)
        types = [
            BYTE if kind == NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)
        ]
        if arch.startswith("gemma"):  # llama.cpp looks its runs of spaces up before it marks spaces
            tokens = [t.replace(SPACE, " ") if k == USER_DEFINED else t for t, k in zip(tokens, types, strict=True)]
    made |= {"tokens": tokens, "token_type": np.asarray(types, np.int32)}
    made |= _special_ids(tokenizer, made)
    return {f"tokenizer.ggml.{key}": value for key, value in made.items()} | _templates(source)


def _tokens(tokenizer: Tokenizer, unknown: str | None, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by id with its type; ids that no token has are unused."""
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    if max(vocab.values(), default=0) >= vocab_size:
        _unsaid(f"has more tokens than the embedding has rows ({vocab_size})")
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    added = tokenizer.backend.get_added_tokens_decoder()
    for token, index in vocab.items():
        tokens[index], types[index] = token, NORMAL
        if index in added:
            types[index] = CONTROL if added[index].special else USER_DEFINED
        if token == unknown:
            types[index] = UNKNOWN
    return tokens, types


def _byte_level(tokenizer: Tokenizer, merges: list[list[str]], ignore_merges: bool) -> dict[str, Any]:
    if any(" " in half for pair in merges for half in pair):
        _unsaid("merges tokens with spaces in them")
    name = pre_tokenizer_name(tokenizer.backend, ignore_merges)
    return {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in merges]}


def pre_tokenizer_name(backend: tokenizers.Tokenizer, ignore_merges: bool) -> str:
    """GGUF's name for the way a byte-level tokenizer cuts text into words, found by what it does with PROBES.

    Raises UnsupportedModelError where none does the same.
    """
    wanted = _words(backend)
    names = [*FIRST_NAMES, *(name for name in PRE_TOKENIZERS if name not in FIRST_NAMES)]
    rules = dict.fromkeys(PRE_TOKENIZERS[name] for name in names if PRE_TOKENIZERS[name].ignore_merges == ignore_merges)
    found = next((rule for rule in rules if _words(_alone(rule)) == wanted), None)
    if found is None:
        _unsaid("cuts text into words in a way that GGUF has no name for")
    return next(name for name in names if PRE_TOKENIZERS[name] == found)


def _alone(rule: PreTokenizer) -> tokenizers.Tokenizer:
    """A tokenizer that does nothing but cut words."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import normalizers
    from tokenizers.models import BPE

    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizer_of(rule)
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def _words(backend: tokenizers.Tokenizer) -> list[list[str]]:
    """What comes before the merges: each probe's words, in the byte alphabet."""
    cut, normal = backend.pre_tokenizer, backend.normalizer
    if cut is None:
        return []
    texts = [probe if normal is None else normal.normalize_str(probe) for probe in PROBES]
    return [[word for word, _ in cut.pre_tokenize_str(text)] for text in texts]


def _sentencepiece(tokenizer: Tokenizer, tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    """Scores that give SentencePiece the order of the merges: it joins the neighbours whose union scores highest.

    A piece's score is how early its first merge comes; pieces that no merge makes come after all.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    scores = np.array([-rank.get(token, len(merges)) for token in tokens], np.float32)
    return {"model": "llama", "scores": scores, "add_space_prefix": _prefixed(tokenizer.backend)}


def _prefixed(backend: tokenizers.Tokenizer) -> bool:
    """Whether a space is put before a text."""
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    words = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
    return words[0][0].startswith(SPACE)


def _is_byte(token: str) -> bool:
    return isinstance(byte_fallback_piece(token), int)


def _special_ids(tokenizer: Tokenizer, made: Mapping[str, Any]) -> dict[str, Any]:
    """Ids by GGUF's names, with up to three that end an answer, and whether BOS and EOS stand around a text."""
    ids: dict[str, Any] = {}
    for name, key in NAMED.items():
        index = tokenizer.id_of(tokenizer.special_tokens.get(name, ""))
        if index is not None:
            ids[f"{key}_token_id"] = index
    if tokenizer.eos_ids:
        ids["eos_token_id"] = tokenizer.eos_ids[0]
    known = end_ids({f"tokenizer.ggml.{key}": value for key, value in {**made, **ids}.items()})
    more = [index for index in tokenizer.eos_ids if index not in known]
    if len(more) > 2:
        _unsaid(f"ends an answer with {len(more) + 1} tokens that are not known to")
    ids |= {f"{key}_token_id": index for key, index in zip(("eot", "eom"), more, strict=False)}
    around = tokenizer.encode("")
    ids["add_bos_token"] = tokenizer.add_bos
    ids["add_eos_token"] = bool(around[int(tokenizer.add_bos) :]) and around[-1] == ids.get("eos_token_id")
    return ids


def _templates(source: Checkpoint) -> dict[str, Any]:
    templates = find_chat_templates(source)
    made: dict[str, Any] = {}
    if "default" in templates:
        made["tokenizer.chat_template"] = templates.pop("default")
    if templates:
        made["tokenizer.chat_templates"] = list(templates)
    return made | {f"tokenizer.chat_template.{name}": text for name, text in templates.items()}


# -- what a reader will make of it -------------------------------------------------------------------------------
def check_tokenizer(source: Checkpoint, preview: Preview) -> None:
    """Raises UnsupportedModelError where the file's tokenizer would give other ids or ends than the original's."""
    other = tokenizer_difference(Tokenizer.from_checkpoint(source), Tokenizer.from_checkpoint(preview))
    if other is not None:
        _unsaid(f"would {other}")


def tokenizer_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """What another tokenizer does in its own way, as words for an error; None where nothing was found.

    Left out is what GGUF does not hold: whether an added token swallows the spaces around it, and that Metaspace puts
    no space before a text that begins with one, as SentencePiece does. The other may know more ends of an answer.
    """
    for text in map(str.lstrip, _probes()) if _metaspace(one.backend) else _probes():
        if one.encode(text) != other.encode(text):
            return f"give other tokens for {text[:40]!r}"
    for index, token in one.backend.get_added_tokens_decoder().items():
        if other.encode(token.content, add_special_tokens=False, parse_special=True) != [index]:
            return f"lose the token {token.content!r:.60}"
    if not set(one.eos_ids) <= set(other.eos_ids) or one.bos_id != other.bos_id:
        return "begin or end a text with other tokens"
    return None


def _metaspace(backend: tokenizers.Tokenizer) -> bool:
    return backend.pre_tokenizer is not None and '"Metaspace"' in str(backend.pre_tokenizer.__getstate__())


def _probes() -> Iterator[str]:
    """PROBES, and some pages of English."""
    from pydoc_data.topics import topics

    yield from PROBES
    yield from (text[:10_000] for text in sorted(topics.values(), key=len)[-4:-2])


def _unsaid(why: str) -> NoReturn:
    raise UnsupportedModelError(
        f"GGUF cannot hold this tokenizer: it {why}.", "Write a folder instead, with the format compressed-tensors."
    )
