"""Tiny trained tokenizers of every kind, and their GGUF metadata, for the tests of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = ["<think>", "</think>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say it's 1234 times; we've 3.14159 and 2024-05-06.",
    "def step(self, x):\n    return [i ** 2 for i in range(10)]  # sq\n\n\tif x <= 0:\r\n\t\traise ValueError('no')",
    "秒推让模型在一秒之内回答。你好，世界！日本語のテキストとカタカナ。한국어 문장도 있습니다.",
    "Ünïcödé naïve façade Straße ΑΒΓ αβγδε Привет мир שלום مرحبا نص عربي हिन्दी वाक्य ไทย",
    "👩‍👩‍👧‍👦 🎉🎉 emoji 👍🏽 flags 🇫🇷 and e\u0301 combining n\u0303 marks",
    '<table><tr><td>HTML</td></tr></table> {"json": [1, 22, 333, 4444]} $x^2 + y^2 = z^2$ ~~ `code` | a|b',
] * 3

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two leading spaces and   three inside  ",
    "tabs\tand\nnewlines\n\n\nand\r\nCRLF\r\n\r\n  \n \n",
    "it's IT'S we'Ll don't 'S 'quoted'",
    "1 12 123 1234 12345678901234567890 3.14 ½ ² Ⅷ ٣٤٥ 1,000,000",
    "你好，世界！秒推。日本語カタカナ ひらがな、한국어 문장",
    "👩‍👩‍👧‍👦👍🏽🇫🇷 ☃️ \U0001f9d1\u200d\U0001f680",
    "e\u0301 e\u0300\u0301 n\u0303 \u0928\u092e\u0938\u094d\u0924\u0947",
    "Привет ΑΒΓαβγ שלום مرحبا ไทย mixed 中英文mixed текст",
    "def f(x):\n    return x**2  # комментарий\n\n\nclass A:\n\tpass",
    "a" * 400 + "ab" * 200,
    "!!!??? ... --- ___ ### $$$ <=> |||| ~~~ `` [[]] {{}} (())",
    "user said <|im_end|> and <s> and </s> then <think>hm</think> done",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "CamelCaseWord HTTPServer XMLHttpRequest iPhone ABCdefGHI",
    "nbsp\u00a0here zero\u200bwidth ideographic\u3000space \u2028 line",
    "\x00 control \x01\x02 \x7f",
    "trailing newline\n",
    "trailing spaces   ",
]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def _split(pattern: str) -> pre.Split:
    return pre.Split(Regex(pattern), behavior="isolated")


def _bytes(use_regex: bool = False) -> pre.ByteLevel:
    return pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def published_pre_tokenizer(name: str) -> Any:
    """The pre-tokeniser as the models' own tokenizer.json composes it."""
    parts = {
        "gpt-2": [_bytes(True)],
        "olmo": [_bytes(True)],
        "smollm": [pre.Digits(individual_digits=True), _bytes(True)],
        "starcoder": [pre.Digits(individual_digits=True), _bytes(True)],
        "llama-bpe": [_split(_LLAMA3), _bytes()],
        "dbrx": [_split(_LLAMA3), _bytes()],
        "qwen2": [_split(_QWEN2), _bytes()],
        "stablelm2": [_split(_QWEN2), _bytes()],
        "tekken": [_split(_TEKKEN), _bytes()],
        "gpt-4o": [_split(_GPT4O), _bytes()],
        "deepseek-v3": [_split(r"\p{N}{1,3}"), _split("[一-龥\u3040-ゟ゠-ヿ]+"), _split(_DEEPSEEK_V3), _bytes()],
        "deepseek-coder": [
            _split("[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split("[一-龥\u0800-一가-\ud7ff]+"),
            pre.Digits(individual_digits=True),
            _bytes(),
        ],
        "falcon": [_split(r"[\p{P}\$\+<=>\^~\|`]+"), _bytes(True), _split("[0-9][0-9][0-9]")],
    }
    return pre.Sequence(parts[name])


BYTE_LEVEL_NAMES = [
    "gpt-2",
    "olmo",
    "smollm",
    "starcoder",
    "llama-bpe",
    "dbrx",
    "qwen2",
    "stablelm2",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
    "deepseek-coder",
    "falcon",
]


def byte_level(name: str = "gpt-2") -> Tokenizer:
    """A trained byte-level BPE with the pre-tokeniser that GGUF files call `name`."""
    backend = Tokenizer(BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    backend.pre_tokenizer = published_pre_tokenizer(name)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _with_added(backend)


def _with_added(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED])
    return backend


def sentencepiece_pieces() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as a SentencePiece BPE model of the corpus would have them."""
    seed = Tokenizer(BPE(unk_token="<unk>"))
    seed.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = [char for char in sorted(set("".join(CORPUS))) if char.isalnum() and ord(char) < 0x3000]
    trainer = trainers.BpeTrainer(
        vocab_size=500, limit_alphabet=90, initial_alphabet=alphabet[:60], show_progress=False, special_tokens=[]
    )
    seed.train_from_iterator([word for line in CORPUS for word in line.split(" ")], trainer)
    learned = [token for token, _ in sorted(seed.get_vocab().items(), key=lambda item: item[1])]
    pieces = [token for token in learned if len(token) > 1] + [token for token in learned if len(token) == 1]
    if "▁" not in pieces:
        pieces.append("▁")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *SPECIALS[3:], *PLAIN_ADDED]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0] * 4
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3, 3, 4, 4]
    return tokens, scores, types


def sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that transformers' conversion makes of such a model."""
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    types = metadata["tokenizer.ggml.token_type"]
    skip = [token for token, kind in zip(tokens, types, strict=True) if kind not in (1, 4)]
    merges = generate_merges(vocab, scores, skip)
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _with_added(backend)


def metaspace() -> Tokenizer:
    """A SentencePiece-like tokenizer of the Metaspace sort, as Mistral's later ones."""
    backend = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator([word for line in CORPUS for word in line.split(" ")], trainer)
    return _with_added(backend)


def gguf_byte_level(backend: Tokenizer, name: str) -> dict[str, Any]:
    """The metadata that a GGUF converter writes for a byte-level backend."""
    import json

    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
    merges = json.loads(backend.to_str())["model"]["merges"]
    kinds = dict.fromkeys(SPECIALS, 3) | dict.fromkeys(PLAIN_ADDED, 4)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": vocab["<s>"],
        "tokenizer.ggml.eos_token_id": vocab["</s>"],
        "tokenizer.ggml.add_bos_token": False,
    }


def gguf_sentencepiece() -> dict[str, Any]:
    tokens, scores, types = sentencepiece_pieces()
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@dataclass
class FakeCheckpoint:
    """As much of a checkpoint as text needs."""

    format: str
    config: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path("model")

    def asset(self, filename: str) -> Path | None:
        file = self.path / filename
        return file if file.is_file() else None
