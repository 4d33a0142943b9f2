"""Merging against direct slow formulas, the properties that the papers claim, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compression needs PyTorch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miaotui.cli.main import main
from miaotui.compress.merge import MergeSettings, merge
from miaotui.compress.methods import merging
from miaotui.errors import CheckpointError, UsageError
from tests.compress import toy_folders as toys

# -- direct slow twins: one element at a time, in float64 ------------------------------------------------------


def slow_linear(base: Any, values: list[float], weights: list[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def slow_tasks(base: float, values: list[float], weights: list[float]) -> float:
    return base + sum(w * (v - base) for w, v in zip(weights, values, strict=True))


def slow_slerp(first: Any, second: Any, at: float) -> Any:
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    angle = math.acos(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))
    made = (math.sin((1 - at) * angle) * a + math.sin(at * angle) * b) / math.sin(angle)
    return made.reshape(first.shape)


def slow_ties(base: Any, models: list[Any], weights: list[float], density: float) -> Any:
    changes = [(model.astype(np.float64) - base).ravel() for model in models]
    for change in changes:
        by_size = sorted(range(len(change)), key=lambda i, c=change: -abs(c[i]))
        for index in by_size[round(len(change) * density) :]:
            change[index] = 0
    made = base.astype(np.float64).ravel().copy()
    for i in range(len(made)):
        total = sum(w * change[i] for w, change in zip(weights, changes, strict=True))
        agreed = [(w, c[i]) for w, c in zip(weights, changes, strict=True) if c[i] * total > 0]
        if agreed:
            made[i] += sum(w * c for w, c in agreed) / sum(w for w, _ in agreed)
    return made.reshape(base.shape)


def each(function: Callable[..., float], base: Any, models: list[Any], weights: list[float]) -> Any:
    flat = [[function(b, list(v), weights)] for b, *v in zip(base.flat, *(m.flat for m in models), strict=True)]
    return np.array(flat).reshape(base.shape)


def slow(method: str, base: Any, models: list[Any], weights: list[float]) -> Any:
    if method == "slerp":
        return slow_slerp(*models, weights[1] / sum(weights))
    if method == "ties":
        return slow_ties(base, models, weights, 0.2)
    return each(slow_linear if method == "linear" else slow_tasks, base, models, weights)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two models trained from it; the base again in bfloat16."""
    where = tmp_path_factory.mktemp("merge")
    config = {**toys.CONFIG, "num_hidden_layers": 1}
    base = toys.draw(config, 0)
    made = {"base": base, "a": toys.draw(config, 1, base), "b": toys.draw(config, 2, base)}
    found = {name: toys.write(where / name, arrays, config) for name, arrays in made.items()}
    found["half"] = toys.write(where / "half", made["a"], config, kind="BF16")
    return found


def merged(folders: dict[str, Path], out: Path, names: str = "ab", **given: Any) -> toys.Arrays:
    base = str(folders["base"]) if given.get("method") in ("ties", "dare", "task-arithmetic") else None
    merge([str(folders[name]) for name in names], MergeSettings(base=base, **given), out)
    return toys.read(out)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "task-arithmetic"])
def test_against_the_slow_twin(method: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    found = merged(folders, tmp_path / "out", method=method, weights=(0.5, 0.25))
    base, a, b = (toys.read(folders[name]) for name in ("base", "a", "b"))
    assert found.keys() == base.keys()
    weights = [0.5, 0.25]
    for name, value in found.items():
        wanted = slow(method, base[name], [a[name], b[name]], weights)
        np.testing.assert_allclose(value, wanted, atol=2e-6, err_msg=name)


def test_a_scale_of_the_change(folders: dict[str, Path], tmp_path: Path) -> None:
    base = toys.read(folders["base"])
    for method in ("ties", "task-arithmetic", "dare"):
        once = merged(folders, tmp_path / f"{method}1", method=method)
        half = merged(folders, tmp_path / f"{method}2", method=method, scale=0.5)
        for name in once:
            np.testing.assert_allclose(half[name] - base[name], (once[name] - base[name]) / 2, atol=1e-6)


# -- what the papers claim -------------------------------------------------------------------------------------
def test_ties_elects_signs() -> None:
    """Yadav et al. 2023, figure 1: the larger total wins, and those who disagree have no part in the mean."""
    changes = [torch.tensor([3.0, 1.0, 2.0, 0.0, 1.0]), torch.tensor([-1.0, 2.0, -2.0, 0.0, -4.0])]
    found = merging.agreeing_mean([*changes, torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0])], [1.0, 1.0, 1.0])
    assert found.tolist() == [2.0, 1.5, 0.0, 0.0, -4.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(2, 4))
def test_ties_never_goes_against_the_elected_sign(seed: int, density: float, models: int) -> None:
    draws = torch.randn(models, 30, generator=torch.Generator().manual_seed(seed))
    changes = [merging.trim(draw, density) for draw in draws]
    for change in changes:
        assert int((change != 0).sum()) == round(30 * density)
    found = merging.ties(torch.zeros(30), list(draws), [1.0] * models, density)
    total = sum(changes)
    assert bool((found * total >= 0).all())
    assert bool(((found != 0) == (total != 0)).all())
    largest = torch.stack(changes).abs().max(dim=0).values
    assert bool((found.abs() <= largest + 1e-6).all())


def test_ties_of_agreeing_models_is_their_mean() -> None:
    """Where no signs clash and nothing is trimmed, TIES is plain averaging."""
    base, a = torch.randn(40), torch.rand(40)
    torch.testing.assert_close(merging.ties(base, [base + a, base + 3 * a], [1.0, 1.0], 1.0), base + 2 * a)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_expected_value(density: float) -> None:
    """Yu et al. 2023, section 3: over many draws the mean is the change itself."""
    change = torch.linspace(-2, 2, 50)
    draws = torch.stack([
        merging.drop_and_rescale(change, density, merging.generator_for(7, i, "w")) for i in range(4000)
    ])  # fmt: skip
    kept = (draws[:, 0] != 0).float().mean()
    assert float(kept) == pytest.approx(density, abs=0.03)
    error = (draws.mean(dim=0) - change).abs()
    deviation = change.abs() * ((1 - density) / density / 4000) ** 0.5
    assert bool((error <= 5 * deviation + 1e-6).all())
    torch.testing.assert_close(draws[0][draws[0] != 0], (change / density)[draws[0] != 0])


def test_slerp_ends_and_lengths() -> None:
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    torch.testing.assert_close(merging.slerp(a, b, 0.0), a)
    torch.testing.assert_close(merging.slerp(a, b, 1.0), b)
    unit_a, unit_b = a / a.norm(), b / b.norm()
    for at in (0.2, 0.5, 0.8):
        assert float(merging.slerp(unit_a, unit_b, at).norm()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(merging.slerp(a, 2 * a, 0.5), 1.5 * a)
    torch.testing.assert_close(merging.slerp(a, torch.zeros_like(a), 0.25), 0.75 * a)


# -- one tensor's draws do not depend on the others ------------------------------------------------------------
def test_dare_is_the_same_again_and_in_any_order(folders: dict[str, Path], tmp_path: Path) -> None:
    one = merged(folders, tmp_path / "1", method="dare", seed=3)
    same = merged(folders, tmp_path / "2", method="dare", seed=3)
    other = merged(folders, tmp_path / "3", method="dare", seed=4)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["lm_head.weight"], other["lm_head.weight"])
    name = "lm_head.weight"
    base, a, b = (torch.from_numpy(toys.read(folders[n])[name]) for n in ("base", "a", "b"))
    alone = merging.dare(base, [a, b], [0.5, 0.5], 0.5, [merging.generator_for(3, i, name) for i in range(2)])
    np.testing.assert_array_equal(one[name], alone.numpy())


def test_the_base_decides_types_and_files(folders: dict[str, Path], tmp_path: Path) -> None:
    merge([str(folders["half"]), str(folders["b"])], MergeSettings(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folders["half"] / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes().count(b'"BF16"') == len(toys.read(folders["a"]))
    half, b, found = (toys.read(f) for f in (folders["half"], folders["b"], tmp_path / "out"))
    for name in found:
        np.testing.assert_allclose(found[name], (half[name] + b[name]) / 2, rtol=2**-8, atol=1e-6)


# -- refusals --------------------------------------------------------------------------------------------------
def test_every_mismatch_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    config = {**toys.CONFIG, "num_hidden_layers": 1, "intermediate_size": 84, "rope_theta": 5e5}
    odd = toys.draw(config, 5)
    words = {f"w{i}": i for i in range(94)} | {"other": 94, "w95": 95}
    toys.write(tmp_path / "odd", odd, config, vocabulary=words)
    with pytest.raises(CheckpointError) as caught:
        merge([str(folders["a"]), str(tmp_path / "odd")], MergeSettings(), tmp_path / "out")
    told = caught.value.message
    for part in (
        "intermediate_size is 84, not 80",
        "attention of layer 0",
        "mlp.gate_proj.weight is 84 × 48, not 80 × 48",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight is 48 × 84",
        "2 of its tokens differ",
        "'w94'",
    ):
        assert part in told
    assert not (tmp_path / "out").exists()


def test_missing_and_surplus_tensors_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    config = {**toys.CONFIG, "num_hidden_layers": 1}
    arrays = toys.draw(config, 5)
    arrays["model.layers.0.extra.weight"] = arrays.pop("model.layers.0.mlp.up_proj.weight")
    toys.write(tmp_path / "odd", arrays, config)
    with pytest.raises(CheckpointError, match=r"it lacks \S*up_proj.weight; it has \S*extra.weight besides"):
        merge([str(folders["a"]), str(tmp_path / "odd")], MergeSettings(), tmp_path / "out")


def test_quantised_inputs_are_refused(folders: dict[str, Path], tmp_path: Path, demo_gguf: Path) -> None:
    with pytest.raises(UsageError, match=r"GGUF file.*Give the original"):
        merge([str(demo_gguf), str(demo_gguf)], MergeSettings(), tmp_path / "out")
    config = {**toys.CONFIG, "num_hidden_layers": 1}
    args = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
    }  # fmt: skip
    toys.write(tmp_path / "coded", toys.draw(config, 1), config)
    with pytest.raises(UsageError, match="are quantised"):
        merge([str(folders["a"]), str(tmp_path / "coded")], MergeSettings(), tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "models", "part"),
    [
        ({"method": "ties"}, 2, "needs a base"),
        ({"method": "linear", "base": "x"}, 2, "no use for a base"),
        ({"method": "slerp", "density": 0.5}, 2, "no use for a density"),
        ({"method": "ties", "base": "x", "density": 0.0}, 2, "density is 0.0"),
        ({"method": "linear", "scale": 2.0}, 2, "no use for a scale"),
        ({"method": "slerp"}, 3, "between two"),
        ({"method": "linear"}, 1, "at least two"),
        ({"weights": (1.0,)}, 2, "1 weights for 2 models"),
        ({"weights": (1.0, -2.0)}, 2, "0 or more"),
        ({"weights": (1.0, math.nan)}, 2, "nan"),
        ({"method": "magic"}, 2, "no method"),
    ],
)
def test_settings_that_mean_nothing(given: dict[str, Any], models: int, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        MergeSettings(**given).weights_for(models)


# -- the command -----------------------------------------------------------------------------------------------
def test_the_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(folders["a"]), str(folders["b"])]
    assert main(["merge", *pair, "--method", "slerp", "--weights", "3,1", "-o", str(tmp_path / "o")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'o'}\n"
    assert err.startswith("12 tensors, 0.0 M parameters")
    assert "weights:\n- 3.0\n- 1.0" in (tmp_path / "o" / "merge.yaml").read_text()
    assert "slerp" in (tmp_path / "o" / "README.md").read_text()
    assert main(["merge", *pair, "--json", "-o", str(tmp_path / "j")]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--weights", "a,b"], "--weights is"),
        (["--seed", "1"], "draws nothing"),
        (["--method", "ties"], "needs a base"),
    ],
)
def test_the_command_refuses(
    flags: list[str], part: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(folders["a"]), str(folders["b"]), *flags, "-o", str(tmp_path / "o")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
