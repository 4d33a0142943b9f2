"""Ids and text against transformers, for each kind of tokenizer and each way it is stored."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import decoders, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from miaotui.checkpoint import open_checkpoint
from miaotui.errors import CheckpointError, RequestError, UnsupportedModelError
from miaotui.model.gguf_pretokenizers import PRE_TOKENIZERS
from miaotui.model.token_text import byte_alphabet
from miaotui.model.tokenizer import Tokenizer
from tests.model import tiny_tokenizers as tiny


def _same(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text, parse_special=True) == theirs(text).input_ids
    assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids
    ids = ours.encode(text, parse_special=True)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def _from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_checkpoint(tiny.FakeCheckpoint("gguf", metadata))


@pytest.mark.parametrize("name", tiny.BYTE_LEVEL_NAMES)
def test_byte_level_gguf_equals_transformers(name: str) -> None:
    backend = tiny.byte_level(name)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ours = _from_gguf(tiny.gguf_byte_level(backend, name))
    for text in tiny.TEXTS:
        _same(ours, theirs, text)
    assert ours.vocab_size == len(theirs)


def test_sentencepiece_gguf_equals_transformers() -> None:
    metadata = tiny.gguf_sentencepiece()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tiny.sentencepiece(metadata), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    ours = _from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False})
    for text in tiny.TEXTS:
        _same(ours, theirs, text)


def _sentencepiece_by_hand(text: str, tokens: list[str], scores: list[float], types: list[int]) -> list[int]:
    """SentencePiece's BPE as its paper says it: join the best-scored neighbours, leftmost first, until none is left."""
    usable = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(-scores[usable[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in usable]
        if not joins:
            break
        at = min(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        ids += [usable[symbol]] if symbol in usable else [3 + byte for byte in symbol.encode()]
    return ids


def test_sentencepiece_gguf_equals_the_definition() -> None:
    metadata = tiny.gguf_sentencepiece()
    ours = _from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False})
    arrays = [metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")]
    for text in tiny.TEXTS[2:]:
        if "<think>" not in text:
            assert ours.encode(text) == _sentencepiece_by_hand(text, *arrays)


def test_sentencepiece_adds_bos_unless_told() -> None:
    metadata = tiny.gguf_sentencepiece()
    ours = _from_gguf(metadata)
    assert ours.add_bos
    assert ours.encode("a")[0] == ours.bos_id == 1
    assert ours.encode("a", add_special_tokens=False)[0] != 1
    both = _from_gguf({**metadata, "tokenizer.ggml.add_eos_token": True})
    assert both.encode("a")[-1] == 2


def test_gemma_gguf_keeps_spaces_and_takes_merges_in_file_order() -> None:
    tokens, _, types = tiny.sentencepiece_pieces()
    metadata = tiny.gguf_sentencepiece() | {
        "general.architecture": "gemma2",
        "tokenizer.ggml.tokens": [*tokens, "  ", "    "],
        "tokenizer.ggml.token_type": [*types, 4, 4],
        "tokenizer.ggml.scores": [-1000.0] * (len(tokens) + 2),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    ours = _from_gguf(metadata)
    assert ours.encode("    ") == [len(tokens) + 1]
    assert ours.decode(ours.encode("  x    y")) == "  x    y"


def test_demo_equals_transformers(demo_gguf: Path) -> None:
    checkpoint = open_checkpoint(demo_gguf)
    ours = Tokenizer.from_checkpoint(checkpoint)
    theirs = AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    # transformers reads the file's pre-tokeniser `smollm` as plain GPT-2; the model's own splits digits first.
    theirs.backend_tokenizer.pre_tokenizer = tiny.published_pre_tokenizer("smollm")
    for text in tiny.TEXTS:
        _same(ours, theirs, text)
    assert ours.vocab_size == 49152
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (1, (2, 0), False)
    assert ours.id_of("<|im_end|>") == 2
    assert ours.token_bytes(ours.encode(" the")[0]) == b" the"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    theirs = PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level("qwen2"), bos_token="<s>", eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    return tmp_path


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def test_tokenizer_json_equals_transformers(saved: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(saved)
    ours = Tokenizer.from_checkpoint(tiny.FakeCheckpoint("safetensors", {}, saved))
    for text in tiny.TEXTS:
        _same(ours, theirs, text)
    assert ours.special_tokens["eos_token"] == "</s>"


def test_all_end_ids_are_found(saved: Path) -> None:
    _edit(saved / "generation_config.json", eos_token_id=[4, 2])
    ours = Tokenizer.from_checkpoint(tiny.FakeCheckpoint("safetensors", {"eos_token_id": 3}, saved))
    assert ours.eos_ids == (2, 4, 3)


def test_the_post_processor_decides_about_bos_as_in_transformers(saved: Path) -> None:
    _edit(saved / "tokenizer_config.json", add_bos_token=True)
    plain = Tokenizer.from_checkpoint(tiny.FakeCheckpoint("safetensors", {}, saved))
    assert plain.encode("hello") == AutoTokenizer.from_pretrained(saved)("hello").input_ids
    assert not plain.add_bos
    backend = tiny.byte_level("qwen2")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(saved / "tokenizer.json"))
    ours = Tokenizer.from_checkpoint(tiny.FakeCheckpoint("safetensors", {}, saved))
    assert ours.add_bos
    assert ours.encode("hello") == AutoTokenizer.from_pretrained(saved)("hello").input_ids
    assert ours.encode("hello")[0] == 1


def test_special_tokens_only_the_config_declares(saved: Path) -> None:
    content = json.loads((saved / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_end|>"]
    (saved / "tokenizer.json").write_text(json.dumps(content))
    _edit(saved / "tokenizer_config.json", pad_token={"content": "<|im_end|>"})
    ours = Tokenizer.from_checkpoint(tiny.FakeCheckpoint("safetensors", {}, saved))
    assert ours.encode("a<|im_end|>", parse_special=True)[-1] == 4
    assert 4 in ours.special_ids


def test_token_bytes_join_to_the_text() -> None:
    byte_level = _from_gguf(tiny.gguf_byte_level(tiny.byte_level("gpt-2"), "gpt-2"))
    pieces = _from_gguf(tiny.gguf_sentencepiece() | {"tokenizer.ggml.add_bos_token": False})
    for tokenizer, prefix in ((byte_level, b""), (pieces, b" ")):
        for text in tiny.TEXTS[1:]:
            if "<think>" not in text:  # after an added token the pieces begin with a space again
                assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == prefix + text.encode()
        assert tokenizer.token_bytes(10**6) == b""
        assert tokenizer.decode([10**6]) == ""


def test_byte_alphabet_is_the_published_one() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == bytes_to_unicode()


def test_threads_do_not_disturb_each_other() -> None:
    tokenizer = _from_gguf(tiny.gguf_byte_level(tiny.byte_level("gpt-2"), "gpt-2"))
    text = "hello <|im_end|> world " * 20
    plain, parsed = tokenizer.encode(text), tokenizer.encode(text, parse_special=True)
    assert plain != parsed
    with ThreadPoolExecutor(4) as pool:
        flags = [bool(i % 2) for i in range(200)]
        for flag, ids in zip(flags, pool.map(lambda f: tokenizer.encode(text, parse_special=f), flags), strict=True):
            assert ids == (parsed if flag else plain)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokenizer.ggml.pre": "no-such"}, UnsupportedModelError, "no-such"),
        ({"tokenizer.ggml.pre": None}, UnsupportedModelError, "no pre-tokeniser"),
        ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError, "bert"),
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModelError, "t5"),
        ({"tokenizer.ggml.merges": None}, CheckpointError, "merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, CheckpointError, "pair"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, CheckpointError, "do not fit"),
        ({"tokenizer.ggml.token_type": [1]}, CheckpointError, "one type per token"),
    ],
)
def test_metadata_that_cannot_be_used(change: dict[str, Any], error: type[Exception], words: str) -> None:
    metadata = tiny.gguf_byte_level(tiny.byte_level("gpt-2"), "gpt-2") | change
    with pytest.raises(error, match=words):
        _from_gguf(metadata)


def test_arrays_may_be_numpy_ones() -> None:
    lists = tiny.gguf_sentencepiece()
    arrays = {key: np.array(value) if key.endswith(("scores", "type")) else value for key, value in lists.items()}
    for text in tiny.TEXTS:
        assert _from_gguf(arrays).encode(text) == _from_gguf(lists).encode(text)
    with pytest.raises(CheckpointError, match="one score per token"):
        _from_gguf(arrays | {"tokenizer.ggml.scores": np.zeros(3)})


def test_twice_the_same_token_is_refused() -> None:
    metadata = tiny.gguf_sentencepiece()
    metadata["tokenizer.ggml.tokens"][10] = metadata["tokenizer.ggml.tokens"][11]
    with pytest.raises(CheckpointError, match="twice"):
        _from_gguf(metadata)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_checkpoint(tiny.FakeCheckpoint("safetensors", {}, tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_checkpoint(tiny.FakeCheckpoint("safetensors", {}, tmp_path))


def test_every_pattern_compiles_and_loses_no_text() -> None:
    base = tiny.byte_level("gpt-2")
    metadata = tiny.gguf_byte_level(base, "gpt-2") | {"tokenizer.ggml.add_bos_token": False}
    from unicodedata import normalize

    for name in PRE_TOKENIZERS:
        ours = _from_gguf(metadata | {"tokenizer.ggml.pre": name})
        for text in tiny.TEXTS:
            want = normalize("NFC", text) if PRE_TOKENIZERS[name].nfc else text
            assert ours.decode(ours.encode(text)) == want, name


def test_the_decoder_of_a_gguf_is_known() -> None:
    assert isinstance(_from_gguf(tiny.gguf_sentencepiece()).backend.decoder, decoders.Sequence)


def test_half_a_character_is_refused_and_named() -> None:
    tokenizer = _from_gguf(tiny.gguf_sentencepiece())
    for text in ("caf\udce9", "\ud83d"):
        with pytest.raises(RequestError, match="not Unicode: it holds"):
            tokenizer.encode(text)


@pytest.mark.parametrize("parse_special", [False, True])
def test_a_long_text_has_the_ids_of_a_short_one(demo_gguf: Path, parse_special: bool) -> None:
    """Long texts go another way through the library, which lets other threads run."""
    ours = Tokenizer.from_checkpoint(open_checkpoint(demo_gguf))
    lines = [f"Line {i} <|im_end|> 秒推 é\n" for i in range(600)]
    long = "".join(lines)
    assert len(long) > 4096 > len(lines[0])
    apart = [i for line in lines for i in ours.encode(line, parse_special=parse_special)]
    assert ours.decode(ours.encode(long, parse_special=parse_special), False) == ours.decode(apart, False) == long
    ids = ours.encode(long, parse_special=parse_special)
    ours.backend.encode_special_tokens = not parse_special
    assert ids == ours.backend.encode(long).ids


def test_least_tokens_is_never_too_many(demo_gguf: Path) -> None:
    tokenizers = [Tokenizer.from_checkpoint(open_checkpoint(demo_gguf)), _from_gguf(tiny.gguf_sentencepiece())]
    for ours in tokenizers:
        longest = max(ours.backend.get_vocab(), key=len)
        for text in (*tiny.TEXTS, "", " " * 5000, "x" * 5000, "word " * 900, longest * 40):
            assert ours.least_tokens(text) <= len(ours.encode(text, add_special_tokens=False, parse_special=True))
    assert tokenizers[0].least_tokens("word " * 100_000) > 4000
