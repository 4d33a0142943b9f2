"""Text to token ids and back, from a checkpoint's `tokenizer.json` or a GGUF file's metadata."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaotui.checkpoint.base import Checkpoint
from miaotui.errors import CheckpointError, RequestError
from miaotui.model.token_text import Joining, byte_fallback_piece, byte_level_bytes, decoder_kind

if TYPE_CHECKING:
    import tokenizers

_NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


_LONG = 4096
"""Characters from which a text is encoded with Python's lock released, which only the library's batches do."""


class Tokenizer:
    """One model's tokenizer: ids for text, text and raw bytes for ids.

    `backend` is the `tokenizers.Tokenizer` underneath; `special_tokens` the named ones by transformers' names
    (`bos_token`, `eos_token`, …), as chat templates see them. Safe to share between threads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.decoder_kind = decoder_kind(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._named_id("bos_token")
        eos = self._named_id("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if eos is None else [eos]), *eos_ids]))
        self._parsing = threading.Lock()
        self._bytes: dict[int, bytes] = {}
        self.add_bos = self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer of an opened checkpoint.

        A GGUF file's own metadata comes before a `tokenizer.json` that lies beside it.
        Raises CheckpointError when there is none, UnsupportedModelError when its kind is not known.
        """
        if checkpoint.format == "gguf" and "tokenizer.ggml.model" in checkpoint.config:
            from miaotui.model.gguf_tokenizer import backend_from_gguf, end_ids, named_special_tokens

            metadata = checkpoint.config
            return cls(
                backend_from_gguf(metadata),
                special_tokens=named_special_tokens(metadata),
                eos_ids=end_ids(metadata),
            )
        file = checkpoint.asset("tokenizer.json")
        if file is None:
            raise CheckpointError(
                f"{checkpoint.path} holds no tokenizer.json.",
                "Write one with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(folder).",
            )
        return cls._from_json(file, checkpoint)

    @classmethod
    def _from_json(cls, file: Path, checkpoint: Checkpoint) -> Tokenizer:
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise CheckpointError(f"{file} cannot be read: {error}.", "Download the model again.") from error
        backend.no_truncation()
        backend.no_padding()
        config = read_json_asset(checkpoint, "tokenizer_config.json")
        specials = _named_special_tokens(config, read_json_asset(checkpoint, "special_tokens_map.json"))
        _add_missing_tokens(backend, config, specials)
        generation = read_json_asset(checkpoint, "generation_config.json")
        eos_ids = [*_ids(generation.get("eos_token_id")), *_ids(checkpoint.config.get("eos_token_id"))]
        known = {name: token for name, token in specials.items() if backend.token_to_id(token) is not None}
        return cls(backend, special_tokens=known, eos_ids=eos_ids)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`.

        `add_special_tokens` puts BOS/EOS where the model's own post-processor does. `parse_special` makes the text
        of a special token (`<|im_end|>`) that token; without it, it is plain text, as it must be for what users
        wrote. Added tokens that are not special (`<think>`) are always recognised, as in transformers.
        """
        with self._parsing:  # the switch is a property of the shared backend
            self.backend.encode_special_tokens = not parse_special
            try:
                if len(text) > _LONG:
                    (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                    return encoding.ids
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            except TypeError as error:
                raise _no_text(text) from error
            finally:
                self.backend.encode_special_tokens = False

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, without the time and memory that encoding it takes.

        No token has more characters than the longest of the vocabulary; a normaliser makes at most four into one
        (Unicode's compositions). White space, which some pre-tokenisers drop, is not counted.
        """
        inked = len(text) - sum(map(text.count, " \n\t\r"))
        return inked // (self._longest * (1 if self.backend.normalizer is None else 4))

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token, at least 1."""
        return max(map(len, self.backend.get_vocab()), default=1) or 1

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes one token adds in the middle of a text; empty for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._bytes_of(token_id)
        return found

    def _bytes_of(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoder_kind.joining is Joining.BYTE_LEVEL:
            return byte_level_bytes(token)
        if self.decoder_kind.joining is Joining.OTHER:
            return token.encode()
        piece = byte_fallback_piece(token)
        return piece.encode() if isinstance(piece, str) else bytes([piece])

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact spelling in the vocabulary, or None."""
        return self.backend.token_to_id(token)


def _no_text(text: str) -> RequestError:
    """Why the library would not take a string: Python's may hold halves of characters, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"it holds {text[error.start]!r} at character {error.start}"
    else:
        raise AssertionError("the tokenizer refused a sound text")
    return RequestError(f"The text is not Unicode: {found}.", "Send text that is sound UTF-8.", param="prompt")


def read_json_asset(checkpoint: Checkpoint, filename: str) -> dict[str, Any]:
    """A JSON object beside the weights; empty when the file is absent. Raises CheckpointError when it is damaged."""
    file = checkpoint.asset(filename)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", "Download the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object.", "Download the model again.")
    return content


def _ids(value: Any) -> list[int]:
    """An `eos_token_id` field: absent, one id or a list of them."""
    if isinstance(value, int):
        return [value]
    return [i for i in value if isinstance(i, int)] if isinstance(value, list) else []


def _token_text(value: Any) -> str | None:
    """A token field of tokenizer_config.json: a string or a serialised AddedToken."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named_special_tokens(config: Mapping[str, Any], token_map: Mapping[str, Any]) -> dict[str, str]:
    """Every `…_token` of both files (tokenizer_config.json wins): the standard names, then a model's own."""
    merged = {**token_map, **config}
    names = [*_NAMED_SPECIALS, *sorted(k for k in merged if k.endswith("_token") and k not in _NAMED_SPECIALS)]
    texts = {name: _token_text(merged.get(name)) for name in names}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        texts.update({name: _token_text(token) for name, token in extra.items()})
    return {name: text for name, text in texts.items() if text is not None}


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], specials: Mapping[str, str]) -> None:
    """Register tokens that tokenizer_config.json declares and tokenizer.json forgot, if the vocabulary has them."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for fields in config.get("added_tokens_decoder", {}).values():
        if fields["content"] not in known and backend.token_to_id(fields["content"]) is not None:
            flags = {
                k: bool(fields.get(k, False)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            backend.add_tokens([AddedToken(fields["content"], **flags)])
            known.add(fields["content"])
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    listed = [_token_text(token) for token in extra] if isinstance(extra, list) else []
    for text in [*specials.values(), *listed]:
        if text is not None and text not in known and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def set_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode` put these tokens around a text."""
    from tokenizers.processors import TemplateProcessing

    ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    found = [(token, i) for token, i in dict(ids).items() if i is not None]
    names = {token for token, _ in found}
    parts = [bos if bos in names else None, "$A", eos if eos in names else None]
    backend.post_processor = TemplateProcessing(single=[p for p in parts if p is not None], special_tokens=found)
