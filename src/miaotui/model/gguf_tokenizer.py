"""A `tokenizers` backend rebuilt from the `tokenizer.ggml.*` metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.model.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from miaotui.model.token_text import SPACE
from miaotui.model.tokenizer import set_bos_eos

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
}

_ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    }
)
"""Control tokens that end a turn or a text whatever the metadata says, by their usual spelling."""


def backend_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The backend that `tokenizer.ggml.model` and its arrays describe.

    Raises UnsupportedModelError for a model or pre-tokeniser that is not known, CheckpointError for missing or
    inconsistent arrays.
    """
    kind = metadata["tokenizer.ggml.model"]
    tokens = _array(metadata, "tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError("The GGUF vocabulary holds the same token twice.", "Convert the model to GGUF again.")
    if kind == "gpt2":
        rule = _pre_tokenizer(metadata)
        backend = _byte_level(vocab, _array(metadata, "merges"), rule)
        add_bos = rule.bos
    elif kind == "llama":
        backend = _sentencepiece(vocab, metadata)
        add_bos = True
    else:
        raise UnsupportedModelError(
            f"The GGUF tokenizer model {kind!r} is not supported.",
            "Byte-level BPE (gpt2) and SentencePiece BPE (llama) are; use the model's safetensors instead.",
        )
    _add_tokens(backend, tokens, _types(metadata))
    named = named_special_tokens(metadata)
    set_bos_eos(
        backend,
        named.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        named.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    return backend


def named_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, … as the metadata's ids name them; ids outside the vocabulary are left out."""
    tokens = _array(metadata, "tokens")
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every id that ends generation: eos, eot and eom as stated, and control tokens known to end a turn."""
    tokens = _array(metadata, "tokens")
    types = _types(metadata)
    stated = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = [i for i in stated if i is not None and 0 <= i < len(tokens)]
    ids += [i for i, kind in enumerate(types) if kind == _CONTROL and tokens[i] in _ENDS]
    return list(dict.fromkeys(ids))


def _types(metadata: Mapping[str, Any]) -> list[int]:
    """The kind of each token; all normal where the file states none."""
    tokens = _array(metadata, "tokens")
    stated = metadata.get("tokenizer.ggml.token_type")
    types: list[int] = [_NORMAL] * len(tokens) if stated is None else np.asarray(stated).tolist()
    if len(types) != len(tokens):
        raise CheckpointError("The GGUF file has not one type per token.", "Convert the model to GGUF again.")
    return types


def _scores(metadata: Mapping[str, Any]) -> list[float]:
    """The score of each token."""
    scores: list[float] = np.asarray(_array(metadata, "scores"), dtype=np.float32).tolist()
    if len(scores) != len(_array(metadata, "tokens")):
        raise CheckpointError("The GGUF file has not one score per token.", "Convert the model to GGUF again.")
    return scores


def _array(metadata: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise CheckpointError(f"The GGUF file has no tokenizer.ggml.{key}.", "Convert the model to GGUF again.")
    array: Sequence[Any] = value
    return array


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    rule = PRE_TOKENIZERS.get(str(name))
    if rule is None:
        cause = (
            "names no pre-tokeniser" if name is None else f"uses the pre-tokeniser {name!r}, which is not known here"
        )
        raise UnsupportedModelError(
            f"The GGUF file {cause}.", "Use the model's safetensors with its tokenizer.json, or a newer conversion."
        )
    return rule


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    """The two halves of each merge; the space between is the first one after the first character."""
    cuts = [merge.find(" ", 1) for merge in merges]
    if -1 in cuts:
        raise CheckpointError("A merge in the GGUF file is not a pair.", "Convert the model to GGUF again.")
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception, for example for a merge of unknown tokens
        raise CheckpointError(f"The GGUF merges do not fit: {error}.", "Convert the model to GGUF again.") from error


def _byte_level(vocab: dict[str, int], merges: Sequence[str], rule: PreTokenizer) -> Tokenizer:
    """GPT-2's BPE: 49k tokens in about 40 ms, half of what parsing the same as JSON takes."""
    backend = Tokenizer(_bpe(vocab, _pairs(merges), ignore_merges=rule.ignore_merges))
    backend.pre_tokenizer = pre_tokenizer_of(rule)
    backend.decoder = decoders.ByteLevel()
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def pre_tokenizer_of(rule: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """What cuts text into words as the rule says, in the byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def _sentencepiece(vocab: dict[str, int], metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: merges recovered from the pieces, bytes for what no piece covers."""
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if gemma:  # runs of spaces are stored as spaces, but are looked up after normalisation
        vocab = {SPACE * len(token) if token.strip(" ") == "" else token: i for token, i in vocab.items()}
    types = _types(metadata)
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is not None:
        pairs = _pairs(merges)
    else:  # Gemma's scores do not follow its merge order; the order of its pieces does
        scores = [-float(i) for i in range(len(vocab))] if gemma else _scores(metadata)
        pairs = sentencepiece_merges(vocab, scores, types)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unk_token = next((token for token, i in vocab.items() if i == unknown), None)
    backend = Tokenizer(_bpe(vocab, pairs, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(joined)
    return backend


def sentencepiece_merges(
    vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies, best first.

    SentencePiece always joins the neighbours whose union has the highest score, so every way to cut a piece into
    two pieces is a merge of that piece's rank (Kudo & Richardson 2018, section 3.2). Equal scores: longer left
    part first, then longer right part, as transformers orders them. Control, unknown, unused and byte pieces take
    no part.
    """
    outside = {_UNKNOWN, _CONTROL, _UNUSED, _BYTE}
    pieces = {token: i for token, i in vocab.items() if types[i] not in outside}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in pieces:
                right = piece[cut:]
                if right in pieces:
                    found.append((-scores[i], -cut, cut - len(piece), left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for _, _, _, left, right in found]


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Register control tokens as special, user-defined ones as plain added tokens; ids stay those of the file."""
    special = [
        AddedToken(t, normalized=False, special=True)
        for t, k in zip(tokens, types, strict=True)
        if k in (_UNKNOWN, _CONTROL)
    ]
    plain = [
        AddedToken(t, normalized=False, special=False) for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED
    ]
    known = [token for token in plain if backend.token_to_id(token.content) is not None]
    backend.add_special_tokens(special)
    backend.add_tokens(known)
