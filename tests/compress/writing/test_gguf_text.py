"""Tokenizers as GGUF metadata: every kind, read back to the same ids, and what GGUF has no words for refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from miaotui.compress.writing.gguf_config import Preview
from miaotui.compress.writing.gguf_text import check_tokenizer, pre_tokenizer_name, tokenizer_metadata
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.model.chat import find_chat_templates
from miaotui.model.gguf_pretokenizers import PRE_TOKENIZERS
from miaotui.model.tokenizer import Tokenizer as Ours
from tests.model import tiny_tokenizers as tiny

ROWS = 900


def folder(path: Path, backend: Tokenizer, eos: Any = None, **config: Any) -> Any:
    """A checkpoint with this tokenizer."""
    backend.save(str(path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return tiny.FakeCheckpoint("safetensors", {}, path)


def read_back(source: Any, arch: str = "llama") -> tuple[dict[str, Any], Ours]:
    made = tokenizer_metadata(source, arch, ROWS)
    preview = Preview({"general.architecture": arch, **made}, [], {})
    check_tokenizer(source, preview)
    return made, Ours.from_checkpoint(preview)


def the_same(one: Ours, other: Ours) -> None:
    for text in tiny.TEXTS:
        assert one.encode(text) == other.encode(text)
        ids = one.encode(text, parse_special=True)
        assert ids == other.encode(text, parse_special=True)
        assert one.decode(ids) == other.decode(ids)
    assert one.special_tokens == other.special_tokens
    assert one.bos_id == other.bos_id
    assert set(one.eos_ids) <= set(other.eos_ids)
    assert one.eos_ids[0] == other.eos_ids[0]
    assert one.special_ids == other.special_ids


@pytest.mark.parametrize("name", tiny.BYTE_LEVEL_NAMES)
def test_byte_level(name: str, tmp_path: Path) -> None:
    source = folder(tmp_path, tiny.byte_level(name))
    made, ours = read_back(source)
    assert PRE_TOKENIZERS[made["tokenizer.ggml.pre"]].patterns == PRE_TOKENIZERS[name].patterns
    the_same(Ours.from_checkpoint(source), ours)
    assert made["tokenizer.ggml.tokens"][-1] == f"[PAD{ROWS - 1}]"
    assert made["tokenizer.ggml.token_type"][-1] == 5
    assert len(made["tokenizer.ggml.tokens"]) == len(made["tokenizer.ggml.token_type"]) == ROWS


def test_common_names_come_first() -> None:
    names = {name: pre_tokenizer_name(tiny.byte_level(name), name in ("llama-bpe", "tekken"))
             for name in ("llama-bpe", "smollm", "qwen2", "gpt-2", "starcoder")}  # fmt: skip
    assert names.pop("starcoder") == "smollm"
    assert all(name == found for name, found in names.items())


@pytest.mark.parametrize("kind", ["replace", "metaspace"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(kind: str, prefix: bool, tmp_path: Path) -> None:
    """Scores, made of the order of the merges; with a normaliser or with Metaspace; with BOS."""
    backend = tiny.sentencepiece(tiny.gguf_sentencepiece())
    if kind == "metaspace":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never", split=False)
    elif not prefix:
        backend.normalizer = normalizers.Replace(" ", "▁")
    if not prefix:
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    source = folder(tmp_path, backend)
    made, ours = read_back(source)
    assert made["tokenizer.ggml.add_space_prefix"] is prefix
    assert made["tokenizer.ggml.add_bos_token"] is True
    assert made["tokenizer.ggml.add_eos_token"] is False
    assert made["tokenizer.ggml.token_type"][:4].tolist() == [2, 3, 3, 6]
    wanted = Ours.from_checkpoint(source)
    for text in tiny.TEXTS:
        if not (kind == "metaspace" and prefix and (text[:1].isspace() or "<think>" in text)):
            assert wanted.encode(text) == ours.encode(text)


def test_scores_are_sentencepieces_own_order(tmp_path: Path) -> None:
    """The score of a piece falls with its place among the merges, as the model's own scores do."""
    given = tiny.gguf_sentencepiece()
    made, _ = read_back(folder(tmp_path, tiny.sentencepiece(given)))
    pieces = [i for i, token in enumerate(given["tokenizer.ggml.tokens"])
              if given["tokenizer.ggml.token_type"][i] == 1 and len(token) > 1]  # fmt: skip
    scores = made["tokenizer.ggml.scores"][pieces]
    assert (scores[:-1] > scores[1:]).all()


def test_gemma_keeps_runs_of_spaces(tmp_path: Path) -> None:
    backend = tiny.sentencepiece(tiny.gguf_sentencepiece())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁", normalized=True), AddedToken("▁▁▁▁", normalized=True)])
    source = folder(tmp_path, backend)
    made = tokenizer_metadata(source, "gemma3", ROWS)
    assert "    " in made["tokenizer.ggml.tokens"]


def test_what_ends_an_answer(tmp_path: Path) -> None:
    """The tokenizer's own first; `<|im_end|>` is known to end a turn by its name; others are written down."""
    backend = tiny.byte_level()
    ids = {token: backend.token_to_id(token) for token in (*tiny.SPECIALS, *tiny.PLAIN_ADDED)}
    source = folder(tmp_path, backend, eos=[ids["<|im_end|>"], ids["<|im_start|>"], ids["</think>"]])
    made, ours = read_back(source)
    assert made["tokenizer.ggml.eos_token_id"] == ids["</s>"]
    assert made["tokenizer.ggml.eot_token_id"] == ids["<|im_start|>"]
    assert made["tokenizer.ggml.eom_token_id"] == ids["</think>"]
    assert set(ours.eos_ids) == {ids["</s>"], ids["<|im_end|>"], ids["<|im_start|>"], ids["</think>"]}
    with pytest.raises(UnsupportedModelError, match="ends an answer with 4 tokens"):
        tokenizer_metadata(folder(tmp_path, backend, eos=[5, 6, 7]), "llama", ROWS)


def test_eos_after_a_text(tmp_path: Path) -> None:
    backend = tiny.byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    made, ours = read_back(folder(tmp_path, backend))
    assert made["tokenizer.ggml.add_eos_token"] is True
    assert made["tokenizer.ggml.add_bos_token"] is False
    assert ours.encode("a")[-1] == ours.eos_ids[0]


def test_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    source = folder(tmp_path, tiny.byte_level(), chat_template=templates)
    made, _ = read_back(source)
    assert made["tokenizer.chat_template"] == "x"
    assert made["tokenizer.chat_templates"] == ["tool_use"]
    assert find_chat_templates(Preview(made, [], {})) == find_chat_templates(source)


# -- no words for ------------------------------------------------------------------------------------------------
def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer_metadata(tiny.FakeCheckpoint("safetensors", {}, tmp_path), "llama", ROWS)


def test_other_models_than_bpe(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(UnsupportedModelError, match="GGUF cannot hold this tokenizer: it is of the kind WordLevel"):
        tokenizer_metadata(folder(tmp_path, backend), "llama", ROWS)


def test_unknown_ways_to_cut_words(tmp_path: Path) -> None:
    backend = tiny.byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]
    )
    with pytest.raises(UnsupportedModelError, match="cuts text into words"):
        tokenizer_metadata(folder(tmp_path, backend), "llama", ROWS)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"more tokens than the embedding has rows \(100\)"):
        tokenizer_metadata(folder(tmp_path, tiny.byte_level()), "llama", 100)


@pytest.mark.parametrize(
    ("key", "changed", "why"),
    [
        ("pre", "qwen2", "would give other tokens"),
        ("merges", lambda merges: merges[:-60], "would give other tokens"),
        ("add_bos_token", True, "would give other tokens"),
        ("token_type", lambda types: types * 0 + 1, "would lose the token"),
        ("bos_token_id", 4, "begin or end"),
        ("eos_token_id", 0, "begin or end"),
    ],
)
def test_differences_are_found(key: str, changed: Any, why: str, tmp_path: Path) -> None:
    source = folder(tmp_path, tiny.byte_level("smollm"))
    made = tokenizer_metadata(source, "llama", ROWS)
    key = f"tokenizer.ggml.{key}"
    made[key] = changed(made[key]) if callable(changed) else changed
    with pytest.raises(UnsupportedModelError, match=why):
        check_tokenizer(source, Preview({"general.architecture": "llama", **made}, [], {}))
