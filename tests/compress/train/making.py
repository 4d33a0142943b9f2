"""A tiny Llama and a tokenizer of bytes, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from miaotui.compress.train.student import Student

TOKENS = 258
"""All bytes, <s> (256) and </s> (257)."""


class tiny:
    """What the tests make, by name."""

    @staticmethod
    def write_tokenizer(folder: Path, size: int = TOKENS) -> None:
        """One token for each byte, the first `size` of them (at most), with </s> after a document."""
        import tokenizers
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel

        alphabet = sorted(ByteLevel.alphabet())[: min(size, TOKENS) - 2]
        vocabulary = {letter: i for i, letter in enumerate(alphabet)}
        backend = tokenizers.Tokenizer(BPE(vocabulary, []))
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<s>", "</s>"])
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))

    @staticmethod
    def config(**changes: object) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": TOKENS,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 256,
            "eos_token_id": 257,
            **changes,
        }

    @staticmethod
    def folder(path: Path, seed: int = 0, spread: float = 4.0, **changes: object) -> Path:
        """A random model's folder; its weights are `spread` times what a new one's are, so that it has opinions."""
        if path.exists():
            return path
        path.mkdir(parents=True)
        tiny.write_tokenizer(path)
        (path / "config.json").write_text(json.dumps(tiny.config(**changes)))
        made = Student.new(tiny.config(**changes), _Assets(path), seed)  # type: ignore[arg-type]
        with torch.no_grad():
            for value in made.values.values():
                if value.dim() == 2:
                    value.mul_(spread)
        made.write(path, replace=True)
        return path

    @staticmethod
    def student(tmp_path: Path, **changes: object) -> Student:
        return Student.of(str(tiny.folder(tmp_path / "tiny", **changes)))


class _Assets:
    """A checkpoint that is only its text files."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path

    def asset(self, filename: str) -> Path | None:
        found = self.path / filename
        return found if found.is_file() else None
