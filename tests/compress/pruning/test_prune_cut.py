"""Cutting: what is left is the model it should be, for every family, in transformers too; and what is refused."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("torch", reason="compression needs PyTorch")
pytest.importorskip("transformers", reason="the tiny models come from transformers")

import torch
import transformers

from miaotui.checkpoint import open_checkpoint
from miaotui.compress.places import Model
from miaotui.compress.pruning.removal import run_without
from miaotui.compress.pruning.run import Cut, PruneReport, PruneSettings, count_of, prune
from miaotui.compress.recipe import Calibration
from miaotui.errors import UnsupportedModelError, UsageError
from miaotui.model.families import read_spec
from tests.compress import toy_folders as toys
from tests.golden import models

CASES = {case.name: case for case in models.CASES}
WINDOWS, WINDOW = 6, 40


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("prune")
    words = np.random.default_rng(0).integers(0, 90, 600)
    (where / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return where


def settings(workplace: Path, **given: Any) -> PruneSettings:
    text = Calibration(str(workplace / "text.txt"), WINDOWS, WINDOW, precision="fp32")
    return PruneSettings(cut=Cut(**given), calibration=text, cache=workplace / "cache")


def run(model: Path, workplace: Path, out: Path, **given: Any) -> PruneReport:
    return prune(str(model), settings(workplace, **given), out)


def golden(case: models.Case, folder: Path) -> tuple[Path, Any]:
    """The case's random model as a folder with a tokenizer, and in memory."""
    model = models.make(case)
    model.save_pretrained(folder / case.name)
    toys.write_tokenizer(folder / case.name, {f"w{i}": i for i in range(models.VOCAB)})
    return folder / case.name, model


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


TOKENS = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(3))


# -- depth -----------------------------------------------------------------------------------------------------
DEEP = ["llama-bias", "qwen3-tied-bias", "gemma2-scale", "phi3", "olmo2", "mixtral"]


@pytest.mark.parametrize("name", DEEP)
def test_blocks_go_and_the_rest_stays_bit_for_bit(name: str, workplace: Path, tmp_path: Path) -> None:
    folder, model = golden(CASES[name], tmp_path)
    report = run(folder, workplace, tmp_path / "out", blocks="2")
    (gone,) = report.removed
    assert report.kl.keys() == {gone}
    assert report.kl_together == pytest.approx(report.kl[gone], rel=1e-3)
    without = copy.deepcopy(model)
    del without.model.layers[gone]
    without.config.num_hidden_layers = 2
    for number, layer in enumerate(without.model.layers):
        layer.self_attn.layer_idx = number
    left = load(tmp_path / "out")
    assert left.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(left, TOKENS), logits(without, TOKENS), atol=1e-5, rtol=1e-5)


def test_blocks_go_by_how_little_they_turn_the_stream(workplace: Path, tmp_path: Path) -> None:
    arrays = toys.draw(toys.CONFIG, 0)
    for layer in (1, 2):  # these do next to nothing
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            arrays[f"model.layers.{layer}.{name}.weight"] *= np.float32(0.01 * layer)
    folder = toys.write(tmp_path / "m", arrays)
    report = run(folder, workplace, tmp_path / "out", blocks="50%")
    assert report.removed == (1, 2)
    assert report.kl[1] < report.kl[2] < 0.1
    assert sorted(toys.read(tmp_path / "out")) == sorted(
        name for name in arrays if "layers.2" not in name and "layers.3" not in name
    )
    np.testing.assert_array_equal(
        toys.read(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], arrays["model.layers.3.mlp.up_proj.weight"]
    )


def test_by_kl_each_goes_where_it_costs_least(workplace: Path, tmp_path: Path) -> None:
    folder, model = golden(CASES["llama"], tmp_path)
    report = run(folder, workplace, tmp_path / "out", blocks="1", by="kl")
    windows = calibration_windows(folder, workplace)
    gone: list[int] = []
    for block in report.removed:
        costs = {i: slow_kl(model, {*gone, i}, windows) for i in range(3) if i not in gone}
        assert block == min(costs, key=costs.__getitem__)
        assert report.kl[block] == pytest.approx(costs[block], rel=1e-3)
        gone.append(block)
    assert report.kl_together == report.kl[gone[-1]]


def test_removals_cost_what_transformers_says(workplace: Path, tmp_path: Path) -> None:
    folder, model = golden(CASES["gemma2-scale"], tmp_path)
    checkpoint = open_checkpoint(folder)
    windows = calibration_windows(folder, workplace)[:3]
    variants = [frozenset({0}), frozenset({2}), frozenset({0, 1}), frozenset[int]()]
    with torch.no_grad():
        found = run_without(Model(checkpoint, *read_spec(checkpoint)), windows, variants).costs(torch.float32)
    np.testing.assert_allclose(found[:3], [slow_kl(model, set(v), windows) for v in variants[:3]], rtol=1e-3)
    assert found[3] == 0


def calibration_windows(folder: Path, workplace: Path) -> torch.Tensor:
    from miaotui.compress.pruning.known import calibrated

    checkpoint = open_checkpoint(folder)
    model = Model(checkpoint, *read_spec(checkpoint))
    given = settings(workplace, blocks="1")
    return calibrated(model, given.calibration, given.cache, lambda done, total: None).tokens(WINDOWS * WINDOW)


def slow_kl(model: Any, gone: set[int], windows: torch.Tensor) -> float:
    """transformers' model without these layers, in float64."""
    without = copy.deepcopy(model)
    without.model.layers = torch.nn.ModuleList(
        [layer for index, layer in enumerate(without.model.layers) if index not in gone]
    )
    without.config.num_hidden_layers = len(without.model.layers)
    p, q = (torch.log_softmax(logits(m, windows.long()).double(), dim=-1) for m in (model, without))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


# -- width -----------------------------------------------------------------------------------------------------
def with_dead_parts(arrays: toys.Arrays) -> None:
    """Make group 1 of block 0 and 2 of the others useless, the last 48 channels, and the first 12 hidden dimensions."""
    hidden = slice(0, 12)
    arrays["model.embed_tokens.weight"][:, hidden] = 0
    for i in range(4):
        prefix = f"model.layers.{i}."
        group = 1 if i == 0 else 2
        arrays[prefix + "self_attn.o_proj.weight"][:, 16 * group : 16 * group + 16] = 0
        arrays[prefix + "mlp.down_proj.weight"][:, 32:] = 0
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            arrays[f"{prefix}{name}.weight"][hidden] = 0


@pytest.mark.parametrize(
    ("given", "tied"),
    [
        ({"groups": "2"}, False),
        ({"channels": "40%"}, False),
        ({"hidden": "36"}, True),
        ({"groups": "2", "channels": "32", "hidden": "75%", "correct": False}, True),
        ({"groups": "2", "channels": "32", "hidden": "36", "blocks": "4"}, False),
    ],
)
def test_what_did_nothing_can_go_and_nothing_changes(
    given: dict[str, Any], tied: bool, workplace: Path, tmp_path: Path
) -> None:
    config = {**toys.CONFIG, "tie_word_embeddings": tied, "rms_norm_eps": 1e-9}
    arrays = toys.draw(config, 1)
    with_dead_parts(arrays)
    folder = toys.write(tmp_path / "m", arrays, config)
    report = run(folder, workplace, tmp_path / "out", **given)
    left = load(tmp_path / "out")
    wanted = {
        "groups": ("num_key_value_heads", 2),
        "channels": ("intermediate_size", 32),
        "hidden": ("hidden_size", 36),
    }
    for what, (key, value) in wanted.items():
        assert getattr(left.config, key) == (value if what in given else toys.CONFIG[key])
    assert report.parameters == sum(parameter.numel() for parameter in left.parameters())
    assert report.parameters < report.parameters_before
    torch.testing.assert_close(logits(left, TOKENS), logits(load(folder), TOKENS), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gemma3", "phi3", "granite", "starcoder2"])
def test_families_can_be_made_narrower(name: str, workplace: Path, tmp_path: Path) -> None:
    folder, _ = golden(CASES[name], tmp_path)
    report = run(folder, workplace, tmp_path / "out", groups="1", channels="64")
    left = load(tmp_path / "out")
    assert (left.config.num_key_value_heads, left.config.num_attention_heads) == (1, 3)
    assert left.config.intermediate_size == 64
    assert report.parameters == sum(parameter.numel() for parameter in left.parameters())
    assert bool(torch.isfinite(logits(left, TOKENS)).all())


def test_correction_helps(workplace: Path, tmp_path: Path) -> None:
    folder, model = golden(CASES["llama"], tmp_path)
    costs = {}
    for correct in (True, False):
        out = tmp_path / str(correct)
        run(folder, workplace, out, channels="64", hidden="63", groups="1", correct=correct)
        windows = calibration_windows(folder, workplace)
        p, q = (torch.log_softmax(logits(m, windows.long()).double(), dim=-1) for m in (model, load(out)))
        costs[correct] = float((p.exp() * (p - q)).sum(dim=-1).mean())
    assert costs[True] < costs[False]


# -- why -------------------------------------------------------------------------------------------------------
def test_the_table_and_the_charts(workplace: Path, tmp_path: Path) -> None:
    folder = toys.write(tmp_path / "m", toys.draw(toys.CONFIG, 2))
    report = run(folder, workplace, tmp_path / "out", blocks="3", groups="2", channels="64", hidden="32")
    with (tmp_path / "out" / "importance.csv").open() as file:
        rows = list(csv.DictReader(file))
    blocks = [row for row in rows if row["part"] == "block"]
    assert [row["block"] for row in blocks if row["kept"] == "no"] == [str(report.removed[0])]
    assert all(float(row["kl"]) > 0 for row in blocks)
    assert float(blocks[report.removed[0]]["importance"]) == min(float(row["importance"]) for row in blocks)
    for part, count, kept in (("heads", 12, 6), ("channel", 320, 192), ("hidden", 48, 32)):
        found = [row for row in rows if row["part"] == part]
        assert len(found) == count
        assert sum(row["kept"] == "yes" for row in found) == kept
        if part == "hidden":
            assert sum(float(row["importance"]) for row in found) == pytest.approx(1, abs=1e-3)
    page = (tmp_path / "out" / "importance.html").read_text()
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    drawn = page.split("<svg")[1:]
    charts = [ElementTree.fromstring("<svg" + chart.split("</svg>")[0] + "</svg>") for chart in drawn]
    assert len(charts) == 5  # two of blocks; heads, channels, hidden dimensions
    assert [len(chart.findall("circle[@class='gone']")) for chart in charts] == [1, 1, 0, 0, 0]
    assert len(charts[2].findall("path[@class='mark']")) == 3 + 3
    assert len(charts[3].findall("rect")) == 3
    notes = (tmp_path / "out" / "README.md").read_text()
    assert "3 of 4 blocks are left" in notes
    assert f"Without blocks {report.removed[0]} " in notes
    assert "removed_blocks:" in (tmp_path / "out" / "prune.yaml").read_text()


# -- refusals --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("olmo2", {"groups": "1"}, "normalised together"),
        ("olmo2", {"hidden": "32"}, "hidden dimensions"),
        ("gemma2", {"hidden": "32"}, "hidden dimensions"),
        ("starcoder2", {"hidden": "32"}, "hidden dimensions"),
        ("mixtral", {"channels": "32"}, "experts"),
    ],
)
def test_families_that_cannot_be_cut_so(
    name: str, given: dict[str, str], part: str, workplace: Path, tmp_path: Path
) -> None:
    folder, _ = golden(CASES[name], tmp_path)
    with pytest.raises(UnsupportedModelError, match=part):
        run(folder, workplace, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "had", "multiple", "left"),
    [(None, 30, 1, 30), ("26", 30, 1, 26), ("75%", 1536, 32, 1152), ("51%", 576, 32, 288), ("1%", 576, 32, 32)],
)
def test_counts(text: str | None, had: int, multiple: int, left: int) -> None:
    assert count_of(text, had, "blocks", multiple) == left


@pytest.mark.parametrize("text", ["0", "31", "-1", "many", "120%", "0.5", ""])
def test_counts_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError, match=r"to be left|would be left"):
        count_of(text, 30, "blocks")


def test_settings_that_mean_nothing(workplace: Path, tmp_path: Path) -> None:
    from miaotui.compress.methods.sparsity import Sparsity

    with pytest.raises(UsageError, match="Nothing is to be pruned"):
        PruneSettings()
    with pytest.raises(UsageError, match="two prunings"):
        PruneSettings(Sparsity.parse("50%"), cut=Cut(blocks="3"))
    with pytest.raises(UsageError, match="by 'size'"):
        Cut(by="size")  # type: ignore[arg-type]
    folder = toys.write(tmp_path / "m", toys.draw(toys.CONFIG, 2))
    with pytest.raises(UsageError, match="Nothing would be cut"):
        run(folder, workplace, tmp_path / "out", blocks="4")
    with pytest.raises(UsageError, match=r"no multiple of the 6 heads.* Keep 42 hidden"):
        run(folder, workplace, tmp_path / "out", hidden="40")
    assert json.loads((folder / "config.json").read_text()) == toys.CONFIG
