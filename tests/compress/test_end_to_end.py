"""Scales and norms trained through the whole model: the gradient is autograd's, codes stay, a kill costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from miaotui.checkpoint import open_checkpoint
from miaotui.compress.end_to_end import _original, _Training
from miaotui.compress.options import steps_of
from miaotui.compress.places import Model
from miaotui.compress.progress import silent
from miaotui.compress.recipe import Recipe
from miaotui.compress.run import Report, _unseen, calibration_text, compress
from miaotui.compress.train import losses, network
from miaotui.compress.types import Place
from miaotui.compress.walk import walk
from miaotui.compress.work import Work
from miaotui.errors import UsageError
from miaotui.model.families import read_spec
from miaotui.quant.tensor import GroupedTensor
from tests.compress import toy_folders
from tests.compress.test_calibrate import words
from tests.compress.test_compress import KILLED
from tests.compress.toys import toy_case, write_original
from tests.compress.writing.test_write_gguf import original as gguf_original
from tests.compress.writing.test_write_gguf import sized

QUICK = {"windows": 64, "epochs": 2, "batch": 4, "rate": 0.004, "norm_rate": 0.004}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return toy_folders.write(tmp_path / "toy", toy_folders.draw(toy_folders.CONFIG, 1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return words(tmp_path / "words.txt", 8000)


def recipe(source: Path, options: dict[str, Any] | None = None, windows: int = 64, **values: Any) -> Recipe:
    calibration = {"source": str(source), "windows": windows, "window": 32, "precision": "fp32"}
    chosen = {"scheme": "w3g16-sym", "method": "rtn+scales", **values, "calibration": calibration}
    if "scales" in chosen["method"]:
        chosen["options"] = {"scales": {**QUICK, **(options or {})}}
    return Recipe.parse(chosen)


def divergence(one: Path, other: Path) -> float:
    """Of predictions for 50 other windows of random tokens, by the trainer's decoder."""
    tokens, found = torch.randint(0, 96, (50, 32), generator=torch.Generator().manual_seed(5)), []
    for folder in (one, other):
        checkpoint = open_checkpoint(folder)
        spec, names = read_spec(checkpoint)
        values = network.read(Model(checkpoint, spec, names))
        last = network.run(spec, values, tokens).last
        found.append(torch.log_softmax(network.logits(spec, last, values[network.head_of(spec)]).double(), dim=1))
    p, q = found
    return float((p.exp() * (p - q)).sum(dim=1).mean())


def tensors(folder: Path) -> Iterator[tuple[Place, Any]]:
    checkpoint = open_checkpoint(folder)
    model = Model(checkpoint, *read_spec(checkpoint))
    for place in model.places():
        yield place, model.values(place)


@pytest.fixture
def both(original: Path, source: Path, tmp_path: Path) -> tuple[Report, Report]:
    plain = compress(str(original), recipe(source, method="rtn"), tmp_path / "plain", cache=tmp_path / "c")
    return plain, compress(str(original), recipe(source), tmp_path / "trained", cache=tmp_path / "c")


def test_predictions_come_nearer_and_no_code_moves(both: tuple[Report, Report], original: Path) -> None:
    plain, trained = both
    assert trained.divergence is not None
    assert trained.divergence["after"] < 0.9 * trained.divergence["before"]
    assert divergence(original, trained.path) < 0.9 * divergence(original, plain.path)
    moved: set[str] = set()
    for (place, before), (_, after) in zip(tensors(plain.path), tensors(trained.path), strict=True):
        if isinstance(before, GroupedTensor):
            np.testing.assert_array_equal(before.codes, after.codes)
            kept = torch.from_numpy(after.scale.copy())
            assert torch.equal(kept, kept.bfloat16().float())
            same = np.array_equal(before.scale, after.scale)
        else:
            same = np.array_equal(before.dense32(), after.dense32())
        moved |= set() if same else {place.role}
    assert moved == {"qkv", "out", "mlp_in", "mlp_out", "attention_norm", "mlp_norm", "norm"}


def test_training_that_does_harm_is_given_up(original: Path, source: Path, tmp_path: Path) -> None:
    chosen = recipe(source, {"rate": 1.0, "epochs": 1})
    spoilt = compress(str(original), chosen, tmp_path / "spoilt", cache=tmp_path / "c")
    plain = compress(str(original), recipe(source, method="rtn"), tmp_path / "plain", cache=tmp_path / "c")
    assert spoilt.divergence is not None
    assert spoilt.divergence["after"] > spoilt.divergence["before"]
    weights = [(report.path / "model.safetensors").read_bytes() for report in (spoilt, plain)]
    assert weights[0] == weights[1]


def test_it_learns_from_windows_that_the_rounding_did_not_see(original: Path, source: Path) -> None:
    checkpoint = open_checkpoint(original)
    model, chosen = Model(checkpoint, *read_spec(checkpoint)), recipe(source, {"windows": 24})
    text = calibration_text(model, chosen)
    unseen = _unseen(model, chosen, text, None)
    assert unseen is not None
    assert unseen.tokens.shape == (24, 32)
    assert not {row.tobytes() for row in unseen.tokens} & {row.tobytes() for row in text.tokens}
    assert _unseen(model, recipe(source, method="rtn"), text, None) is None


# -- against autograd over the whole model -------------------------------------------------------------------------
def training(name: str, scheme: str, folder: Path, **values: Any) -> _Training:
    path = write_original(toy_case(name), folder)
    checkpoint = open_checkpoint(path)
    model = Model(checkpoint, *read_spec(checkpoint))
    vocabulary = min(model.spec.vocab_size, 90)
    toy_folders.write_tokenizer(path, {f"w{i}": i for i in range(vocabulary)})
    calibration = {"source": str(words(folder / "words.txt", 300)), "windows": 4, "window": 16}
    chosen = Recipe.parse({"scheme": scheme, "method": "rtn+scales", "calibration": calibration, **values})
    work = Work(model, chosen, folder / "work", calibration_text(model, chosen), None, "fp32")
    return _Training(work, walk(work), torch.float32)


CASES = [
    ("llama-bias", "w3g32-sym", {}),
    ("llama-bias", "w4g32-asym", {}),
    ("llama-bias", "w4g32-asym", {"format": "gguf"}),
    ("gemma2", "w3g32-sym", {}),
    ("qwen3-moe", "w3g32-sym", {}),
    ("granite", "w3-sym", {"method": "rotate+rtn+scales"}),
]


@pytest.mark.parametrize(("name", "scheme", "values"), CASES, ids=lambda v: str(v)[:30])
def test_the_gradient_is_autograd_s(name: str, scheme: str, values: dict[str, Any], tmp_path: Path) -> None:
    one = training(name, scheme, tmp_path, **values)
    with torch.no_grad():
        one.prepare(silent)
        for place, ratio in one.ratios.items():
            ratio += 0.05 * torch.randn(ratio.shape, generator=torch.Generator().manual_seed(len(str(place))))
        rates = [group["peak"] for group in one.optimiser.param_groups]
        for group in one.optimiser.param_groups:
            group["peak"] = 0.0
        one.descend(torch.tensor([2, 0]), 1.0)
    assert min(rates) > 0
    slow = slow_gradients(one, torch.tensor([2, 0]))
    for place, ratio in one.ratios.items():
        found = torch.zeros_like(ratio) if ratio.grad is None else ratio.grad
        scale = float(slow[place].abs().max())
        assert torch.allclose(found, slow[place], atol=1e-4 * scale + 1e-9, rtol=1e-3), place


def slow_gradients(one: _Training, chosen: torch.Tensor) -> dict[Place, torch.Tensor]:
    """The mean divergence's, by the trainer's decoder with all layers in memory."""
    assert one.work.text is not None
    tokens = torch.from_numpy(one.work.text.tokens.astype(np.int64))[chosen]
    spec, original = one.spec, network.read(one.work.model)
    values = {place: torch.from_numpy(np.array(one.model.values(place).dense32())) for place in one.model.places()}
    values[one.model.head] = torch.from_numpy(np.array(one.model.values(one.model.head).dense32()))
    ratios = {place: torch.zeros_like(ratio).requires_grad_() for place, ratio in one.ratios.items()}
    for place, ratio in ratios.items():
        if ratio.dim() == 1:
            values[place] = values[place] * ratio.exp()
            continue
        tensor = one.model.values(place)
        assert isinstance(tensor, GroupedTensor)
        floor = np.zeros_like(tensor.scale) if tensor.minimum is None else tensor.minimum
        whole = values[place].view(*tensor.scale.shape, -1)
        stays = torch.from_numpy(floor)[..., None] * (1.0 if one.student.free else 0.0)
        values[place] = ((whole - stays) * ratio.exp()[..., None] + stays).flatten(1)
    with torch.no_grad():
        target = network.logits(spec, network.run(spec, original, tokens).last, original[network.head_of(spec)])
    own = network.logits(spec, network.run(spec, values, tokens).last, values[one.model.head])
    losses.divergence(own, target).mean().backward()
    return {place: torch.zeros_like(r) if r.grad is None else r.grad for place, r in ratios.items()}


def test_the_original_is_read_once(tmp_path: Path) -> None:
    """Also where it was killed between two layers; and what a crash left half-written is not taken."""
    one = training("llama-bias", "w3g32-sym", tmp_path)
    told: list[int] = []
    with torch.no_grad():
        first = _original(one.work, torch.float32, lambda p: told.append(p.done))
        whole = first.all().clone()
        _original(one.work, torch.float32, lambda p: told.append(p.done))
        layers = len(one.spec.layers)
        assert told == [*range(layers + 2), layers + 1]
        first.write(slice(0, 1), torch.zeros_like(whole[:1]))
        again = _original(one.work, torch.float32, silent)
    torch.testing.assert_close(again.all(), whole, atol=0, rtol=0)
    assert float(whole.abs().max()) > 0


# -- from disk -----------------------------------------------------------------------------------------------------
def test_killed_while_it_trains_it_ends_with_the_same_bytes(original: Path, source: Path, tmp_path: Path) -> None:
    """While the original is asked, and after the first and the second of four steps."""
    chosen = recipe(source, {"windows": 8, "epochs": 1, "batch": 2}, windows=8)
    (tmp_path / "recipe.yaml").write_text(chosen.yaml())
    run = [sys.executable, "-c", KILLED, str(original), str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [*run, str(tmp_path / "killed"), str(tmp_path / "c"), "10", "7", "5"],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.stdout.split("\n")[:4] == ["killed 0"] * 3 + ["done 0"]
    subprocess.run([*run, str(tmp_path / "whole"), str(tmp_path / "c")], env=environment, check=True)
    for path in sorted((tmp_path / "whole").iterdir()):
        if path.suffix != ".yaml":
            assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name


def test_a_gguf_file_s_scales_are_trained_too(source: Path, tmp_path: Path) -> None:
    chosen = recipe(source, scheme="q4_1", format="gguf")
    folder = gguf_original(sized("llama"), tmp_path)
    report = compress(str(folder), chosen, tmp_path / "out.gguf", cache=tmp_path / "c")
    assert report.divergence is not None
    assert report.divergence["after"] < report.divergence["before"]


# -- what is asked for ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "fp8+scales", "scheme": "fp8"}, "scales of fp8 weights"),
        ({"method": "rtn+scales", "options": {"scales": {"epoch": 2}}}, "Did you mean 'epochs'"),
        ({"method": "rtn+scales", "options": {"scales": {"epochs": 0}}}, "on 64 windows for 0 epochs"),
        ({"method": "rtn+scales", "options": {"scales": {"rate": float("nan")}}}, "rates nan"),
        ({"method": "scales+rtn"}, "Write rtn+scales"),
        ({"method": "rtn", "options": {"scales": {}}}, "which the method 'rtn' lacks"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(toy_folders.write(tmp_path / "toy", toy_folders.draw(toy_folders.CONFIG, 1)))
    with pytest.raises(UsageError) as error:
        steps_of(Recipe.parse(values), read_spec(checkpoint)[0])
    assert message in f"{error.value} {error.value.hint}"
