"""Shapes without weights: the tensors that loading asks for, of every family, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from miaotui.errors import CheckpointError, ModelNotFoundError, ResourceError, UnsupportedModelError, UsageError
from miaotui.model.dummy import DummyCheckpoint, dummy_name, is_dummy, open_dummy
from miaotui.model.weights import prepare_weights
from miaotui.quant.tensor import BlockTensor, DenseTensor
from tests.golden.models import BASE, CASES, Case
from tests.model.test_families_weights import Notes

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


def opened(folder: Path, config: dict[str, Any], kind: str = "q4_0", layers: int | None = None) -> DummyCheckpoint:
    (folder / "config.json").write_text(json.dumps(config))
    return open_dummy(dummy_name(str(folder), kind, layers))


def config_of(case: Case) -> dict[str, Any]:
    return {**BASE, "model_type": case.family, "architectures": [f"{case.prefix}ForCausalLM"], **case.settings}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loading_asks_for_exactly_these(case: Case, tmp_path: Path) -> None:
    made = opened(tmp_path, config_of(case))
    ops: Any = Notes()
    weights = prepare_weights(ops, made.spec, made.described.names, made)  # which refuses what is absent or left over
    assert len(weights.layers) == len(made.spec.layers)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("qwen2.5-7b", 7_615_616_512), ("qwen3-30b-a3b", 30_532_122_624)],
)
def test_the_shipped_configurations_are_those_models(name: str, parameters: int) -> None:
    made = open_dummy(dummy_name(str(CONFIGS / f"{name}.json"), "bf16"))
    assert sum(math.prod(shape) for shape in made.shapes.values()) == parameters
    assert made.nbytes == pytest.approx(2 * parameters, rel=1e-3)


def test_kinds_by_role(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "mixtral")
    made = opened(tmp_path, {**config_of(case), "hidden_size": 64, "intermediate_size": 96})
    embedding = made.tensor("model.embed_tokens.weight")
    assert isinstance(embedding, BlockTensor)
    assert embedding.kind == "Q8_0"
    layer = "model.layers.0."
    expert = made.tensor(f"{layer}block_sparse_moe.experts.1.w2.weight")
    assert isinstance(expert, BlockTensor)
    assert (expert.kind, expert.shape) == ("Q4_0", (64, 96))
    router = made.tensor(f"{layer}block_sparse_moe.gate.weight")
    assert isinstance(router, DenseTensor)
    assert router.type == "bfloat16"
    assert (made.tensor(f"{layer}input_layernorm.weight").dense32() == 1).all()
    with pytest.raises(CheckpointError, match="no tensor"):
        made.tensor("lm_head.bias")


def test_an_offset_norm_scales_nothing(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "gemma2")
    assert (opened(tmp_path, config_of(case)).tensor("model.norm.weight").dense32() == 0).all()


def test_tokens_are_numbers(tmp_path: Path) -> None:
    made = opened(tmp_path, {**config_of(CASES[0]), "eos_token_id": 2})
    tokenizer = made.tokenizer()
    assert tokenizer.encode("7 210 hello 211") == [7, 210, 0, 0]
    assert tokenizer.decode([7, 210]) == "7 210"
    assert tokenizer.eos_ids == made.spec.eos_token_ids == ()


def test_fewer_layers(tmp_path: Path) -> None:
    assert len(opened(tmp_path, config_of(CASES[0]), layers=1).spec.layers) == 1
    with pytest.raises(UsageError, match="model of 3"):
        opened(tmp_path, config_of(CASES[0]), layers=4)


def test_the_name_and_the_fingerprint(tmp_path: Path) -> None:
    assert is_dummy("dummy:q4_0/2:a:b/config.json")
    assert not any(map(is_dummy, ("demo", "dummy", "dummy:q4_0", "org/name:file.gguf")))
    first, second = (opened(tmp_path, config_of(CASES[0]), kind).fingerprint() for kind in ("q4_0", "q4_1"))
    assert first != second


def test_memory_is_asked_for_beforehand(tmp_path: Path) -> None:
    made = open_dummy(dummy_name(str(CONFIGS / "qwen2.5-7b.json"), "w4g32-sym"))
    made.check_memory(7 << 30)
    with pytest.raises(ResourceError, match=r"needs 12\.5 GB .* 2 times\), but 7\.5 GB") as refused:
        made.check_memory(7 << 30, copies=2)
    assert "--regimes" in refused.value.hint
    with pytest.raises(ResourceError) as refused:
        made.check_memory(1 << 30, copies=2)
    assert "--quantization" in refused.value.hint


def test_what_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no configuration"):
        open_dummy(f"dummy:q4_0:{tmp_path}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="not a config"):
        open_dummy(f"dummy:q4_0:{tmp_path}/model.gguf")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        open_dummy(f"dummy:q4_0:{tmp_path}")
    with pytest.raises(UnsupportedModelError, match="BertModel"):
        _ = opened(tmp_path, {"architectures": ["BertModel"]}).spec
