"""Every place of a model, read from both formats of it: the names differ, the values do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the tiny models come from PyTorch and transformers")
pytest.importorskip("transformers", reason="the tiny models come from transformers")

from miaotui.checkpoint import open_checkpoint
from miaotui.compress.places import LINEARS, NORMS, Model
from miaotui.compress.types import Place
from miaotui.errors import CheckpointError
from miaotui.model.families import read_spec
from tests.golden import gguf_files, models

NAMES = ("llama-bias", "llama-tied", "mixtral", "mixtral-split", "qwen3-moe", "gemma3", "phi3", "olmo2", "starcoder2")
CASES = [case for case in models.CASES if case.name in NAMES]


def read(path: Path) -> Model:
    checkpoint = open_checkpoint(path)
    return Model(checkpoint, *read_spec(checkpoint))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case's folder and GGUF file, each written once."""
    folder, made = tmp_path_factory.mktemp("places"), {}

    def make(case: models.Case) -> tuple[Model, Model]:
        if case.name not in made:
            model = models.make(case)
            model.save_pretrained(folder / case.name)
            gguf_files.write(model, case, folder / f"{case.name}.gguf")
            made[case.name] = read(folder / case.name), read(folder / f"{case.name}.gguf")
        return made[case.name]

    return make


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_formats_hold_the_same_places_and_values(case: models.Case, both: Any) -> None:
    folder, gguf = both(case)
    places = list(folder.places())
    assert places == list(gguf.places())
    assert len(set(places)) == len(places)
    for place in places:
        ours, theirs = folder.values(place).dense32(), gguf.values(place).dense32()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 if place.role in NORMS else 0, err_msg=str(place))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_tensor_is_left_over(case: models.Case, both: Any) -> None:
    for model in both(case):
        left = model.present - {model.name(place) for place in model.places()}
        assert all(any(part in name for part in model.names.ignorable) for name in left), left


def test_an_offset_is_added_to_norms_alone(both: Any) -> None:
    folder, _ = both(next(case for case in CASES if case.name == "gemma3"))
    place = Place("attention_norm", 0)
    np.testing.assert_array_equal(folder.values(place).dense32(), folder.stored(place).dense32() + 1)
    weight = Place("qkv", 0)
    np.testing.assert_array_equal(folder.values(weight).dense32(), folder.stored(weight).dense32())


def test_every_linear_of_a_mixture_is_a_matrix(both: Any) -> None:
    for model in both(next(case for case in CASES if case.name == "mixtral")):
        experts = [place for place in model.places() if place.role == "expert_in"]
        assert {(p.layer, p.expert, p.part) for p in experts} == {
            (layer, expert, part) for layer in range(models.LAYERS) for expert in range(5) for part in (0, 1)
        }
        assert all(len(model.stored(p).shape) == 2 for p in model.places() if p.role in LINEARS)


def test_a_missing_weight_is_named(both: Any) -> None:
    folder, _ = both(CASES[0])
    without = Model(folder.checkpoint, folder.spec, folder.names)
    without.__dict__["present"] = folder.present - {"model.layers.1.mlp.down_proj.weight"}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        list(without.places())
