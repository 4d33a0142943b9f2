"""Zeros: the ones that the methods choose on the model's own inputs, written smaller, read back and run the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compression needs PyTorch")
pytest.importorskip("transformers", reason="the tiny models come from transformers")

import torch
import transformers

from miaotui import LLM, SamplingParams
from miaotui.cli.main import main
from miaotui.compress.methods.sparsegpt import shared_factor, sparsegpt
from miaotui.compress.methods.sparsity import Sparsity
from miaotui.compress.methods.wanda import wanda
from miaotui.compress.pruning.run import PruneReport, PruneSettings, prune
from miaotui.compress.recipe import Calibration
from miaotui.errors import UsageError
from tests.compress import toy_folders as toys
from tests.golden import models

CONFIG = {**toys.CONFIG, "num_hidden_layers": 2}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WINDOWS, WINDOW = 6, 40


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a model in bfloat16."""
    where = tmp_path_factory.mktemp("sparse")
    words = np.random.default_rng(0).integers(0, 90, 600)
    (where / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    toys.write(where / "model", toys.draw(CONFIG, 0), CONFIG, kind="BF16")
    return where


def run(workplace: Path, out: Path, sparsity: str = "50%", model: str = "model", **given: Any) -> PruneReport:
    text = Calibration(str(workplace / "text.txt"), WINDOWS, WINDOW, precision="fp32")
    settings = PruneSettings(Sparsity.parse(sparsity), calibration=text, cache=workplace / "cache", **given)
    return prune(str(workplace / model), settings, out)


def linears(arrays: toys.Arrays) -> toys.Arrays:
    return {name: array for name, array in arrays.items() if name.split(".")[-2] in LINEARS}


# -- what becomes 0 --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("storage", ["bitmask", "dense"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_as_many_as_asked_for(method: Any, sparsity: str, storage: Any, workplace: Path, tmp_path: Path) -> None:
    report = run(workplace, tmp_path / "out", sparsity, method=method, storage=storage)
    before, after = toys.read(workplace / "model"), toys.read(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, array in linears(after).items():
        zeros = array == 0
        assert zeros.mean() == pytest.approx(0.5, abs=0.03), name
        if sparsity == "2:4":
            assert (zeros.reshape(-1, 4).sum(axis=1) >= 2).all(), name
        if method != "sparsegpt":
            np.testing.assert_array_equal(array[~zeros], before[name][~zeros])
    for name in before.keys() - linears(before).keys():
        np.testing.assert_array_equal(after[name], before[name])
    assert report.zeros == pytest.approx(sum((a == 0).sum() for a in linears(after).values()) / report.parameters)
    assert (report.error is None) == (method == "magnitude")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_by_the_inputs_that_transformers_sees(method: Any, workplace: Path, tmp_path: Path) -> None:
    """XᵀX gathered by hooks on transformers' modules, on the same windows."""
    run(workplace, tmp_path / "out", method=method, storage="dense")
    sums = hooked_moments(workplace)
    found, before = toys.read(tmp_path / "out"), toys.read(workplace / "model")
    for name, array in linears(found).items():
        weight, moment = torch.from_numpy(before[name]), sums[name.removesuffix(".weight")]
        half = Sparsity.parse("50%")
        if method == "wanda":
            wanted = wanda(weight, half, moment)
        else:
            wanted = sparsegpt(weight, half, shared_factor(moment))
        same = (wanted == 0).numpy() == (array == 0)
        assert same.mean() > 0.99, name
        np.testing.assert_allclose(array[same], wanted.numpy()[same], rtol=0.02, atol=0.01)


def hooked_moments(workplace: Path) -> dict[str, torch.Tensor]:
    from miaotui.compress.pruning.known import calibrated
    from miaotui.compress.writing import dense

    text = Calibration(str(workplace / "text.txt"), WINDOWS, WINDOW, precision="fp32")
    model = dense.open_dense(str(workplace / "model"), "prune")
    tokens = calibrated(model, text, workplace / "cache", lambda done, total: None).tokens(WINDOWS * WINDOW)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(workplace / "model", dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].flatten(0, -2)
            sums[name] = x.T @ x

        return keep

    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        theirs(tokens.long(), use_cache=False)
    return sums


def test_experts_that_no_token_reached_go_by_magnitude(workplace: Path, tmp_path: Path) -> None:
    case = next(case for case in models.CASES if case.name == "qwen3-moe")
    model = models.make(case)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3:] = -layer.mlp.gate.weight[:1]  # 3 to 6 are never both of the best two
            layer.mlp.gate.weight[4:] *= 0.1
    model.save_pretrained(workplace / "experts")
    toys.write_tokenizer(workplace / "experts", {f"w{i}": i for i in range(models.VOCAB)})
    report = run(workplace, tmp_path / "out", model="experts", method="wanda")
    after = toys.read(tmp_path / "out")
    experts = [array for name, array in after.items() if ".experts." in name]
    assert len(experts) == 3 * 3 * 7
    assert all((array == 0).mean() == pytest.approx(0.5, abs=0.02) for array in experts)
    (note,) = [note for note in report.notes if "No token of the calibration" in note]
    assert "expert_in" in note


# -- bytes -----------------------------------------------------------------------------------------------------
def test_leaving_zeros_out_saves_their_bytes(workplace: Path, tmp_path: Path) -> None:
    reports = {
        kind: run(workplace, tmp_path / kind, "75%", method="magnitude", storage=kind) for kind in ("bitmask", "dense")
    }
    sparse = linears(toys.read(tmp_path / "bitmask"))
    numbers = sum(array.size for array in sparse.values())
    stored = sum(2 * np.count_nonzero(a) + a.shape[0] * (-(-a.shape[1] // 8) + 8) + 16 for a in sparse.values())
    rest = reports["dense"].dense_bytes - 2 * numbers
    header = reports["bitmask"].bytes - stored - rest
    assert 0 < header < 8000
    assert reports["bitmask"].bytes < 0.65 * reports["dense"].bytes
    assert reports["bitmask"].dense_bytes == reports["dense"].dense_bytes
    for name, array in toys.read(tmp_path / "dense").items():
        np.testing.assert_array_equal(toys.read(tmp_path / "bitmask")[name], array)
    told = json.loads((tmp_path / "bitmask" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "compressed-tensors"
    assert told["sparsity_config"]["format"] == "sparse-bitmask"
    assert told["sparsity_config"]["global_sparsity"] == pytest.approx(0.75, abs=0.01)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_what_is_said_of_bytes_and_speed(workplace: Path, tmp_path: Path) -> None:
    words = {
        kind: " ".join(run(workplace, tmp_path / kind, method="magnitude", storage=kind).notes)
        for kind in ("bitmask", "dense")
    }
    for text in words.values():
        assert "no time" in text
    assert "--storage dense" in words["bitmask"]
    assert "as large as it was" in words["dense"]
    assert "no time" in (tmp_path / "bitmask" / "README.md").read_text()


def test_both_run_the_same_and_dense_in_transformers(workplace: Path, tmp_path: Path) -> None:
    answers = []
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)
    for kind in ("bitmask", "dense"):
        run(workplace, tmp_path / kind, "2:4", method="sparsegpt", storage=kind)
        with LLM(str(tmp_path / kind), max_model_len=64) as llm:
            (output,) = llm.generate([[5, 6, 7, 8]], params)
        answers.append(list(output.outputs[0].token_ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    wanted = theirs.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert answers[0] == answers[1]
    assert answers[0][:2] == wanted[0, 4:6].tolist()


def test_sparse_folders_can_be_merged_and_pruned_again(workplace: Path, tmp_path: Path) -> None:
    run(workplace, tmp_path / "a", "2:4", method="magnitude")
    text = Calibration(str(workplace / "text.txt"), WINDOWS, WINDOW)
    settings = PruneSettings(Sparsity.parse("75%"), "wanda", "dense", calibration=text, cache=workplace / "cache")
    prune(str(tmp_path / "a"), settings, tmp_path / "b")
    for name, array in linears(toys.read(tmp_path / "b")).items():
        was = toys.read(tmp_path / "a")[name]
        assert (array == 0).mean() > 0.7
        assert not array[was == 0].any()


def test_the_table_of_errors(workplace: Path, tmp_path: Path) -> None:
    report = run(workplace, tmp_path / "out", method="wanda")
    with (tmp_path / "out" / "importance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["block"]) for row in rows] == [
        (f"sparse:{key}", str(block)) for block in range(2) for key in ("qkv", "out", "mlp_in", "mlp_out")
    ]
    assert report.error == pytest.approx(np.mean([float(row["importance"]) for row in rows]), rel=1e-4)
    assert (tmp_path / "out" / "importance.html").read_text().count("<rect") == 8
    better = run(workplace, tmp_path / "best", method="sparsegpt")
    assert better.error is not None
    assert report.error is not None
    assert better.error < report.error


# -- refusals and the command ----------------------------------------------------------------------------------
def test_what_cannot_be_pruned(workplace: Path, tmp_path: Path, demo_gguf: Path) -> None:
    with pytest.raises(UsageError, match="GGUF file"):
        prune(str(demo_gguf), PruneSettings(Sparsity.parse("50%")), tmp_path / "out")
    with pytest.raises(UsageError, match=r"Rows of 48 weights are not made of groups of 32"):
        run(workplace, tmp_path / "out", "16:32", method="magnitude")
    with pytest.raises(UsageError, match="There is no 'brain'"):
        run(workplace, tmp_path / "out", method="brain")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == []


def test_the_command(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(workplace / "model"), tmp_path / "o"
    assert main(["prune", model, "--sparsity", "50%", "--method", "magnitude", "-o", str(out)]) == 0
    printed, told = capsys.readouterr()
    assert printed == f"{out}\n"
    assert told.startswith("0.0 of 0.0 M parameters, 39.8% of them 0, 0.1 MB\n")
    assert "with every zero stored: 0.1 MB" in told
    assert "no time" in told
    text = ["--calibration", str(workplace / "text.txt"), "--windows", "6", "--window", "40"]
    assert main(["prune", model, "--blocks", "50%", *text, "--json", "-o", str(tmp_path / "j")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["removed"]) == 1
    assert report["parameters"] < report["parameters_before"]
    assert report["calibration"]["windows"] == 6


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "Nothing is to be pruned"),
        (["--sparsity", "half"], "The sparsity is 'half'"),
        (["--sparsity", "50%", "--blocks", "1"], "two prunings"),
        (["--blocks", "1", "--method", "wanda"], "--method needs --sparsity"),
        (["--blocks", "1", "--storage", "dense"], "--storage needs --sparsity"),
        (["--sparsity", "50%", "--by", "kl"], "--by needs a cut"),
        (["--sparsity", "50%", "--method", "magnitude", "--windows", "3"], "magnitude measures nothing"),
        (["--blocks", "3"], "3 of 2 blocks would be left"),
    ],
)
def test_the_command_refuses(
    flags: list[str], part: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(workplace / "model"), *flags, "-o", str(tmp_path / "o")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
