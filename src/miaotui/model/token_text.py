"""What one token contributes to text, for each way a tokenizer's decoder joins tokens.

Three decoders cover the causal models: byte-level (GPT-2: every token is bytes in a printable alphabet), byte
fallback (SentencePiece: text with `▁` for a space, plus `<0xNN>` tokens for bytes) and Metaspace (SentencePiece
without bytes). Anything else is `OTHER` and is decoded by the `tokenizers` library over a window.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Joining(Enum):
    """How a decoder makes text out of tokens."""

    BYTE_LEVEL = "byte-level"
    BYTE_FALLBACK = "byte-fallback"
    METASPACE = "metaspace"
    OTHER = "other"


@dataclass(frozen=True)
class DecoderKind:
    """`strip_first`: one leading space of the whole text is dropped (for Metaspace: every space of the first token)."""

    joining: Joining
    strip_first: bool = False


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where printable, else the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in alphabet]
    alphabet.update((byte, chr(0x100 + i)) for i, byte in enumerate(hidden))
    return alphabet


_BYTE_OF = {char: byte for byte, char in byte_alphabet().items()}


def decoder_kind(backend: tokenizers.Tokenizer) -> DecoderKind:
    """The kind of the backend's decoder, read from its own serialised form."""
    if backend.decoder is None:
        return DecoderKind(Joining.OTHER)
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return DecoderKind(Joining.BYTE_LEVEL)
    if names == ["Metaspace"] and steps[0].get("replacement") == SPACE:
        return DecoderKind(Joining.METASPACE, steps[0].get("prepend_scheme", "always") != "never")
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and _is_space_replacement(steps[0]):
        if names[3:] == []:
            return DecoderKind(Joining.BYTE_FALLBACK)
        strip = steps[3]
        if names[3:] == ["Strip"] and (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0):
            return DecoderKind(Joining.BYTE_FALLBACK, strip_first=True)
    return DecoderKind(Joining.OTHER)


def _is_space_replacement(step: dict[str, Any]) -> bool:
    return bool(step["pattern"] == {"String": SPACE} and step["content"] == " ")


def byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; a token outside the alphabet (an added one) is its own UTF-8."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def byte_fallback_piece(token: str) -> str | int:
    """A SentencePiece token as text, or as the byte value (0–255) of a `<0xNN>` token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else token.replace(SPACE, " ")
