"""Students of every family: the decoder's logits, and folders that transformers and we ourselves read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from miaotui.compress.places import LINEARS
from miaotui.compress.train.student import Lora, Student, shape_config
from miaotui.compress.types import Place
from miaotui.errors import UsageError
from tests.compress.train.making import TOKENS, tiny
from tests.golden import gguf_files, models

NAMES = ("llama-bias", "llama-tied", "qwen3", "gemma3", "phi3", "olmo2", "starcoder2", "mixtral", "qwen2")
CASES = [case for case in models.CASES if case.name in NAMES]


def tokens_of(case: models.Case) -> torch.Tensor:
    return torch.randint(3, models.VOCAB, (2, min(case.length, 24)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_is_read_and_written(case: models.Case, tmp_path: Path) -> None:
    theirs = models.make(case)
    theirs.save_pretrained(tmp_path / "m")
    tiny.write_tokenizer(tmp_path / "m", models.VOCAB)
    tokens = tokens_of(case)
    student = Student.of(str(tmp_path / "m"))
    with torch.no_grad():
        wanted = theirs(tokens).logits
        found = student.forward(tokens)
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-4)
    student.write(tmp_path / "out")
    again = Student.of(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again.forward(tokens), found)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        np.testing.assert_allclose(loaded(tokens).logits.numpy(), wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "qwen2"])
def test_a_gguf_file_becomes_a_folder(name: str, tmp_path: Path) -> None:
    case = next(case for case in models.CASES if case.name == name)
    theirs = models.make(case)
    gguf_files.write(theirs, case, tmp_path / "m.gguf")
    tiny.write_tokenizer(tmp_path, models.VOCAB)
    tokens = tokens_of(case)
    student = Student.of(str(tmp_path / "m.gguf"))
    student.write(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(tokens).logits
        np.testing.assert_allclose(student.forward(tokens).numpy(), wanted.numpy(), atol=1e-4)
        np.testing.assert_allclose(loaded(tokens).logits.numpy(), wanted.numpy(), atol=1e-4)


def test_gradients_reach_every_parameter(tmp_path: Path) -> None:
    for case in CASES:
        models.make(case).save_pretrained(tmp_path / case.name)
        student = Student.of(str(tmp_path / case.name))
        parameters = student.parameters()
        student.forward(tokens_of(case)).square().mean().backward()
        missing = [name for name, value in parameters.items() if value.grad is None or not value.grad.abs().sum() > 0]
        dead = {"k_proj.bias", "experts"}  # softmax does not see a key's bias; an expert may see no token
        assert all(any(part in name for part in dead) for name in missing), (case.name, missing)


def test_layers_that_are_run_again_give_the_same_gradients(tmp_path: Path) -> None:
    student = tiny.student(tmp_path)
    tokens = torch.randint(0, TOKENS, (2, 12))
    parameters, found = student.parameters(), []
    for recompute in (False, True):
        reading, head = student.run(tokens, states=frozenset({0, 1}), recompute=recompute)
        loss = reading.states[0].mean() + reading.states[1].square().mean() + (reading.last @ head.T).square().mean()
        found.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    for plain, again in zip(*found, strict=True):
        assert (plain is None and again is None) or torch.allclose(plain, again, atol=1e-7)


# -- low-rank additions ------------------------------------------------------------------------------------------
def test_low_rank_additions_start_as_nothing_and_are_merged_on_writing(tmp_path: Path) -> None:
    student = tiny.student(tmp_path)
    tokens = torch.randint(0, TOKENS, (2, 12))
    with torch.no_grad():
        before = student.forward(tokens)
        student.adapt(Lora(3, alpha=5.0, targets=("*.q_proj", "*.down_proj")))
        assert torch.allclose(student.forward(tokens), before, atol=1e-6)
    parameters = student.parameters()
    assert {name.rpartition(".")[2] for name in parameters} == {"lora_down", "lora_up"}
    assert {name.split(".")[-2] for name in parameters} == {"q_proj", "down_proj"}
    with torch.no_grad():
        for value in parameters.values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
        changed = student.forward(tokens)
        assert float((changed - before).abs().max()) > 0.01
        student.write(tmp_path / "merged")
        merged = Student.of(str(tmp_path / "merged")).forward(tokens)
    np.testing.assert_allclose(merged.numpy(), changed.numpy(), atol=1e-4)


def test_low_rank_additions_train_nothing_else(tmp_path: Path) -> None:
    student = tiny.student(tmp_path)
    student.adapt(Lora(2))
    student.parameters()
    student.forward(torch.randint(0, TOKENS, (1, 8))).sum().backward()
    assert all(value.grad is None for value in student.values.values())
    with pytest.raises(UsageError, match="No linear is called"):
        tiny.student(tmp_path).adapt(Lora(2, targets=("*.wq",)))


# -- codes -------------------------------------------------------------------------------------------------------
def test_a_coded_student_computes_with_codes_and_learns_the_numbers_underneath(tmp_path: Path) -> None:
    student = tiny.student(tmp_path)
    tokens = torch.randint(0, TOKENS, (2, 12))
    student.code("w3g8-sym")
    place = Place("qkv", 1, 0)
    coded, grid = student.effective()[place].detach(), student.grids[place]
    codes = coded.view(len(coded), -1, 8) / grid.scale[..., None]
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert (int(codes.round().min()), int(codes.round().max())) == (-4, 3)
    wrong = (coded - student.values[place]).view(codes.shape).abs() / grid.scale[..., None]
    inside = (student.values[place].view(codes.shape) / grid.scale[..., None]).abs() < 3
    assert float(wrong[inside].max()) <= 0.5 + 1e-5
    parameters = student.parameters()
    student.forward(tokens).square().mean().backward()
    assert all(value.grad is not None for value in parameters.values())
    with torch.no_grad():
        student.values[place].neg_()
    student.refresh()
    assert float((student.effective()[place] + coded).detach().abs().mean()) < 0.5 * float(coded.abs().mean())
    assert set(student.grids) == {p for p in student.values if p.role in LINEARS and not p.bias}


@pytest.mark.parametrize("scheme", ["fp8", "w8a8", "keep", "w4g7-sym"])
def test_codes_that_cannot_be_trained_are_refused(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        tiny.student(tmp_path).code(scheme)


def test_codes_and_low_rank_additions_exclude_each_other(tmp_path: Path) -> None:
    student = tiny.student(tmp_path)
    student.code("w4g8-sym")
    with pytest.raises(UsageError, match="cannot be merged into codes"):
        student.adapt(Lora(2))


# -- new models --------------------------------------------------------------------------------------------------
def test_a_new_model_has_the_shape_asked_for_and_is_the_same_by_seed(tmp_path: Path) -> None:
    source = tiny.student(tmp_path)
    config = shape_config(source.config, {"layers": 1, "hidden": 48, "heads": 3, "ffn": 40})
    one, same, other = (Student.new(config, source.source, seed) for seed in (1, 1, 2))
    assert (one.spec.hidden_size, len(one.spec.layers), one.spec.layers[0].attention.head_dim) == (48, 1, 16)
    assert all(torch.equal(one.values[place], same.values[place]) for place in one.values)
    assert not torch.equal(one.values[Place("embedding")], other.values[Place("embedding")])
    one.write(tmp_path / "new")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    tokens = torch.randint(0, TOKENS, (1, 9))
    with torch.no_grad():
        np.testing.assert_allclose(loaded(tokens).logits.numpy(), one.forward(tokens).numpy(), atol=1e-4)


def test_impossible_shapes_are_refused(tmp_path: Path) -> None:
    config = tiny.student(tmp_path).config
    with pytest.raises(UsageError, match="has no 'depth'"):
        shape_config(config, {"depth": 3})
    with pytest.raises(UsageError, match="do not divide"):
        shape_config(config, {"hidden": 50, "heads": 4})
