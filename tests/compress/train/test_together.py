"""Several processes, students in codes, and the command itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miaotui.checkpoint import open_checkpoint
from miaotui.cli.main import main
from miaotui.compress.places import LINEARS, Model
from miaotui.compress.train.coded import grids_of
from miaotui.compress.train.distil import Request, distil
from miaotui.compress.train.settings import Settings, Task, Terms
from miaotui.compress.train.student import Lora, Student
from miaotui.errors import UsageError
from miaotui.model.families import read_spec
from miaotui.quant.tensor import GroupedTensor
from tests.compress.train.making import tiny
from tests.compress.train.running import SMALL, everything, go, write_text


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings_of(tmp_path: Path, **changes: object) -> Settings:
    return replace(SMALL, tasks=(Task(str(write_text(tmp_path / "text.txt"))),), **changes)  # type: ignore[arg-type]


# -- processes ---------------------------------------------------------------------------------------------------
def test_two_processes_are_one_with_double_the_batch(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.compress.train.running", str(tmp_path / "two"), "0"]
    for name in ("two", "one"):
        tiny.folder(tmp_path / name / "teacher")
        tiny.folder(tmp_path / name / "student", seed=1, num_hidden_layers=1, hidden_size=24)
    done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(i + 1) for i in range(10)]
    alone = go(tmp_path / "one", everything(tmp_path / "one", 0.0))
    together = json.loads((tmp_path / "two" / "out" / "training.json").read_text())
    assert together["tokens"] == alone["tokens"]
    for one, two in zip(alone["held_out"], together["held_out"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(two[name].numpy(), one[name].numpy(), atol=5e-3, err_msg=name)


# -- codes -------------------------------------------------------------------------------------------------------
def coded_folder(tmp_path: Path, scheme: str = "w4g8-sym") -> Path:
    student = tiny.student(tmp_path)
    student.code(scheme)
    student.write(tmp_path / "coded", "bfloat16")
    return tmp_path / "coded"


@pytest.mark.parametrize("scheme", ["w4g8-sym", "w4g8-asym", "w8-sym"])
def test_a_coded_folder_is_read_and_written_on_its_own_grids(tmp_path: Path, scheme: str) -> None:
    folder = coded_folder(tmp_path, scheme)
    student = Student.of(str(folder))
    linears = {place for place in student.values if place.role in LINEARS and not place.bias}
    assert set(student.grids) == linears
    changed = next(iter(sorted(linears)))
    student.values[changed] = student.values[changed] * 0.9
    student.write(tmp_path / "again", "bfloat16")
    one, two = (_opened(tmp_path / name) for name in ("coded", "again"))
    for place in linears:
        before, after = one.values(place), two.values(place)
        assert isinstance(before, GroupedTensor)
        assert isinstance(after, GroupedTensor)
        assert np.array_equal(before.scale, after.scale)
        assert np.array_equal(before.codes, after.codes) == (place != changed)
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def _opened(folder: Path) -> Model:
    checkpoint = open_checkpoint(folder)
    return Model(checkpoint, *read_spec(checkpoint))


def test_a_coded_student_gets_nearer_to_its_teacher_in_its_scheme(tmp_path: Path) -> None:
    folder = coded_folder(tmp_path, "w2g8-sym")
    settings = settings_of(tmp_path, steps=40, evaluate_every=20, rate=1e-3, terms=Terms(kl=1.0))
    report = distil(Request(str(folder), str(tmp_path / "tiny")), tmp_path / "out", settings)
    losses = [judged["loss"] for judged in report["held_out"]]
    assert losses[-1] < 0.9 * losses[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())
    assert any(name.endswith("weight_packed") for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert set(grids_of(_opened(tmp_path / "out"))) == set(Student.of(str(folder)).grids)


def test_codes_that_training_cannot_imitate_are_refused(tmp_path: Path) -> None:
    folder = coded_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="more than weights"):
        Student.of(str(folder))


def test_codes_of_codes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in codes already"):
        Student.of(str(coded_folder(tmp_path))).code("w4g8-sym")


# -- the command ---------------------------------------------------------------------------------------------------
def run(tmp_path: Path, *options: object) -> int:
    text = write_text(tmp_path / "text.txt")
    fixed = ["--data", text, "--window", 16, "--batch", 4, "--steps", 4, "--evaluate-every", 2, "--precision", "fp32"]
    return main(["distill", *map(str, [*options, *fixed, "-o", tmp_path / "out"])])


def test_the_command_writes_with_our_engine_and_prints_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny.folder(tmp_path / "teacher")
    done = run(tmp_path, teacher, "--student", "layers=1", "--lora", 2, "--on-policy", 0.5, "--hidden", 0.1, "--json")
    printed = capsys.readouterr()
    assert done == 0, printed.err
    report = json.loads(printed.out)
    assert report["settings"]["on_policy"] == 0.5
    assert "step 4/4" in printed.err
    assert Student.of(str(tmp_path / "out")).spec.vocab_size == 258


def test_low_rank_training_leaves_the_rest_alone(tmp_path: Path) -> None:
    teacher = tiny.folder(tmp_path / "teacher")
    student = tiny.folder(tmp_path / "student", seed=1)
    request = Request(str(student), str(teacher), lora=Lora(2, targets=("*.q_proj",)))
    distil(request, tmp_path / "out", settings_of(tmp_path))
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--student", "layers=1"], "either a teacher or none"),
        (["T", "--from-scratch", "--student", "layers=1"], "either a teacher or none"),
        (["--from-scratch", "--student", "layers=1"], "change of a teacher's"),
        (["--from-scratch", "--student", "T", "--temperature", "2"], "about a teacher"),
        (["--from-scratch", "--student", "T", "--on-policy", "0.5"], "without a teacher's opinion"),
        (["T", "--student", "T", "--kl", "0"], "All terms of the loss"),
        (["T", "--student", "T", "--kl", "0", "--ce", "1"], "no say in the loss"),
        (["T", "--student", "T", "--lora-alpha", "4"], "of low-rank additions"),
        (["T", "--student", "T", "--dp-epsilon", "4"], "both --dp-epsilon and --dp-delta"),
        (["T", "--student", "T", "--tokenizer", "T"], "given twice"),
        (["T", "--student", "depth=3"], "has no 'depth'"),
        (["T", "--student", "T", "--held-out", "0", "--patience", "2"], "nothing is held out"),
    ],
)
def test_bad_usage_is_said(options: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = str(tiny.folder(tmp_path / "teacher"))
    assert run(tmp_path, *(teacher if option == "T" else option for option in options)) == 2
    assert why in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    teacher = tiny.folder(tmp_path / "teacher")
    student = tiny.folder(tmp_path / "student", vocab_size=300)
    with pytest.raises(UsageError, match="258 tokens and the student 300"):
        distil(Request(str(student), str(teacher)), tmp_path / "out", settings_of(tmp_path))


def test_windows_are_no_longer_than_the_models_know(tmp_path: Path) -> None:
    teacher = tiny.folder(tmp_path / "teacher")
    with pytest.raises(UsageError, match="longer than the 128"):
        distil(Request("layers=1", str(teacher)), tmp_path / "out", settings_of(tmp_path, window=129))
