"""Statistics against a direct run of the whole model; what is kept, and what a run that was ended leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from miaotui.checkpoint import open_checkpoint
from miaotui.compress import statistics
from miaotui.compress.calibrate import calibrate, key_of
from miaotui.compress.layers import read_layer, read_matrix, run_layer
from miaotui.compress.places import Model
from miaotui.compress.progress import Progress
from miaotui.compress.recipe import Calibration
from miaotui.compress.statistics import mirrored
from miaotui.compress.text.data import CalibrationText, windows
from miaotui.errors import UsageError
from miaotui.model.families import read_spec
from miaotui.model.tokenizer import Tokenizer
from tests.compress import toy_folders


def words(path: Path, count: int = 3000) -> Path:
    random = np.random.default_rng(7)
    path.write_text(" ".join(f"w{i}" for i in random.integers(0, 96, count)))
    return path


def open_model(folder: Path) -> Model:
    checkpoint = open_checkpoint(folder)
    return Model(checkpoint, *read_spec(checkpoint))


def text_of(model: Model, source: Path, count: int = 6, window: int = 16) -> CalibrationText:
    return windows(Tokenizer.from_checkpoint(model.checkpoint), Calibration(str(source), count, window))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return open_model(toy_folders.write(tmp_path / "toy", toy_folders.draw(toy_folders.CONFIG, 1)))


@pytest.fixture
def text(model: Model, tmp_path: Path) -> CalibrationText:
    return text_of(model, words(tmp_path / "words.txt"))


def direct(model: Model, text: CalibrationText) -> list[dict[str, list[torch.Tensor]]]:
    """What each layer's linears are given, all of it kept."""
    hidden = read_matrix(model, "embedding")[torch.from_numpy(text.tokens).long()]
    found = []
    for index in range(len(model.spec.layers)):
        heard: dict[str, list[torch.Tensor]] = {"before": [hidden]}
        hidden = run_layer(
            model.spec,
            read_layer(model, index),
            hidden,
            listen=lambda key, x, heard=heard: heard.setdefault(key, []).append(x),  # type: ignore[misc]
        )
        heard["after"] = [hidden]
        found.append(heard)
    return found


def test_statistics_are_those_of_a_direct_run(
    model: Model, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miaotui.compress.hidden.TOKENS_AT_ONCE", 32)  # several chunks
    kept = calibrate(model, text, tmp_path / "cache", precision="fp32")
    for index, heard in enumerate(direct(model, text)):
        found = kept.layer(index)
        assert set(found.inputs) == {"qkv", "out", "mlp_in", "mlp_out"}
        for key, one in found.inputs.items():
            x = torch.cat(heard[key]).double()
            assert one.rows == len(x) == text.tokens.size
            torch.testing.assert_close(one.moment.double(), x.T @ x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.low.double(), x.amin(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.high.double(), x.amax(0), rtol=1e-5, atol=1e-6)
        values = torch.cat(heard[f"values.{index}"])
        assert found.values is not None
        torch.testing.assert_close(found.values, values.abs().amax(0), rtol=1e-5, atol=1e-6)
        cosine = torch.nn.functional.cosine_similarity(heard["before"][0], heard["after"][0], dim=-1)
        assert found.similarity == pytest.approx(float(cosine.mean()), rel=1e-5)
    head = kept.head()
    assert head.rows == text.tokens.size
    norm = torch.nn.functional.rms_norm(heard["after"][0], (48,), None, 1e-5)
    x = norm.flatten(0, 1) * torch.from_numpy(toy_folders.read(model.checkpoint.path)["model.norm.weight"])
    torch.testing.assert_close(head.moment, x.T @ x, rtol=1e-4, atol=1e-4)
    assert not list(kept.folder.glob("*.bin"))


def test_a_second_time_nothing_is_computed(model: Model, text: CalibrationText, tmp_path: Path) -> None:
    first = calibrate(model, text, tmp_path, precision="fp32")
    before = {path: path.stat().st_mtime_ns for path in first.folder.glob("layer-*")}
    told: list[Progress] = []
    second = calibrate(model, text, tmp_path, precision="fp32", tell=told.append)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.glob("layer-*")} == before
    assert [p.done for p in told] == [4]


def test_other_text_or_arithmetic_has_statistics_of_its_own(
    model: Model, text: CalibrationText, tmp_path: Path
) -> None:
    other = text_of(model, tmp_path / "words.txt", count=5)
    keys = {key_of(model, text, "fp32"), key_of(model, other, "fp32"), key_of(model, text, "bf16")}
    assert len(keys) == 3


class Ended(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("damage", [False, True])
def test_an_ended_run_goes_on_to_the_same_bytes(
    model: Model, text: CalibrationText, tmp_path: Path, after: int, damage: bool
) -> None:
    whole = calibrate(model, text, tmp_path / "whole", precision="fp32")

    def end(progress: Progress) -> None:
        if progress.done == after:
            raise Ended

    with pytest.raises(Ended):
        calibrate(model, text, tmp_path / "ended", precision="fp32", tell=end)
    folder = tmp_path / "ended" / whole.folder.name
    (stream,) = folder.glob("hidden-*.bin")
    if damage:
        with stream.open("r+b") as file:
            file.seek(400)
            file.write(b"\0" * 64)
    told: list[Progress] = []
    again = calibrate(model, text, tmp_path / "ended", precision="fp32", tell=told.append)
    assert told[0].done == (0 if damage else after)
    for path in sorted(whole.folder.glob("layer-*")):
        assert path.read_bytes() == (again.folder / path.name).read_bytes()


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    arrays = toy_folders.draw(toy_folders.CONFIG, 1)
    arrays["model.layers.2.mlp.up_proj.weight"][3, 4] = np.inf
    model = open_model(toy_folders.write(tmp_path / "toy", arrays))
    text = text_of(model, words(tmp_path / "words.txt"))
    with pytest.raises(UsageError, match=r"layer 2 are not finite before mlp_out"):
        calibrate(model, text, tmp_path / "cache", precision="fp32")


def test_old_statistics_make_room(
    model: Model, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = calibrate(model, text, tmp_path / "cache", precision="fp32")
    monkeypatch.setattr("miaotui.compress.calibrate.KEPT_BYTES", 1)
    other = text_of(model, tmp_path / "words.txt", count=5)
    new = calibrate(model, other, tmp_path / "cache", precision="fp32")
    assert new.folder.is_dir()
    assert not old.folder.exists()


def test_files_hold_exactly_what_was_gathered(tmp_path: Path) -> None:
    x = torch.randn(100, 37)
    gathering = statistics.Gathering()
    gathering("mlp_in", x[:60])
    gathering("mlp_in", x[60:])
    gathering("keys.0", x)
    found = gathering.finish("a layer")
    statistics.save(tmp_path / "file", found)
    again = statistics.load(tmp_path / "file")
    assert torch.equal(again.inputs["mlp_in"].moment, found.inputs["mlp_in"].moment)
    assert torch.equal(again.inputs["mlp_in"].moment, again.inputs["mlp_in"].moment.T)
    assert again.inputs["mlp_in"].rows == 100
    assert again.keys is not None
    assert torch.equal(again.keys, x.abs().amax(0))


@pytest.mark.parametrize("size", [1, 511, 1100])
def test_mirrored(size: int) -> None:
    full = torch.randn(size, size)
    full = full + full.T
    noise = full.triu() + torch.randn(size, size).tril(-1)
    assert torch.equal(mirrored(noise), full)
