"""Every tensor of a file is accounted for, or the model is not loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miaotui.errors import CheckpointError
from miaotui.model import names
from miaotui.model.families import hf
from miaotui.model.families.spec import make_spec
from miaotui.model.weights import halves, prepare_weights
from miaotui.quant.tensor import DenseTensor, Tensor
from tests.model.test_families import LLAMA


@dataclass
class Folder:
    """A checkpoint in memory."""

    tensors: dict[str, tuple[int, ...]]
    path: Path = Path("folder")
    format: str = "safetensors"
    config: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"There is no tensor {name!r}.", "Download it again.")
        return DenseTensor("float32", np.zeros(self.tensors[name], np.float32))

    def asset(self, filename: str) -> Path | None:
        return None

    def fingerprint(self) -> str:
        return ""


class Notes:
    """Ops that note the shapes they are given."""

    def prepare_linear(self, parts: Any, bias: Any = None) -> Any:
        return [part.shape for part in parts], None if bias is None else bias.shape

    def prepare_embedding(self, table: Tensor) -> Any:
        return table.shape

    def prepare_norm(self, weight: Any, eps: float, **more: Any) -> Any:
        return weight.shape


def whole() -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,), "lm_head.weight": (100, 64)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (64, 64) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (96, 64) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (64, 96)}
        shapes |= {f"{layer}{x}_layernorm.weight": (64,) for x in ("input", "post_attention")}
    return shapes


def prepare(tensors: dict[str, tuple[int, ...]], **config: Any) -> Any:
    described = hf.describe({**LLAMA, **config})
    ops: Any = Notes()
    return prepare_weights(ops, make_spec(described, None), described.names, Folder(tensors))


def test_roles_are_stacked() -> None:
    weights = prepare(whole())
    assert weights.layers[1].qkv == ([(64, 64)] * 3, None)
    assert weights.layers[1].mlp_in == ([(96, 64)] * 2, None)
    assert weights.head == ([(100, 64)], None)


def test_a_tied_head_is_the_embedding_itself() -> None:
    weights = prepare(whole(), tie_word_embeddings=True)
    assert weights.head is weights.embedding


def test_saved_frequencies_are_ignored() -> None:
    assert prepare({**whole(), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)})


def drop(name: str) -> Callable[[dict[str, tuple[int, ...]]], None]:
    return lambda tensors: tensors.pop(name) and None


def put(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, tuple[int, ...]]], None]:
    return lambda tensors: tensors.update({name: shape})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (drop("lm_head.weight"), "lm_head.weight"),
        (put("model.layers.0.self_attn.q_proj.bias", (64,)), "q_proj.bias"),
        (put("model.layers.2.input_layernorm.weight", (64,)), "model.layers.2"),
        (put("model.layers.0.self_attn.q_proj.weight", (32, 64)), "q_proj"),
        (put("model.layers.0.self_attn.q_proj.weight", (4096,)), "q_proj"),
        (put("model.norm.weight", (63,)), "model.norm"),
        (put("model.embed_tokens.weight", (99, 64)), "embed_tokens"),
    ],
)
def test_a_missing_left_over_or_misshapen_tensor_is_named(damage: Any, named: str) -> None:
    tensors = whole()
    damage(tensors)
    with pytest.raises(CheckpointError, match=named):
        prepare(tensors)


def test_a_bias_that_the_configuration_promises_must_be_there() -> None:
    with pytest.raises(CheckpointError, match="bias"):
        prepare(whole(), attention_bias=True)


def test_halves_undoes_the_converters_order() -> None:
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim)
    converted = rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert (converted[halves(heads, head_dim)] == rows).all()


def test_names_of_merged_and_separate_projections() -> None:
    assert names.HF.stems("qkv", 3) == tuple(f"model.layers.3.self_attn.{x}_proj" for x in "qkv")
    assert names.HF_PHI3.stems("qkv", 3) == ("model.layers.3.self_attn.qkv_proj",)
    assert names.GGUF.stems("expert_in", 1, 5) == ("blk.1.ffn_gate.5", "blk.1.ffn_up.5")
    assert names.HF_OLMO2.stems("mlp_norm", 0) == ()
