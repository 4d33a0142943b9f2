"""From a toy model to an artefact with its card, everything real: built, scored, timed, confirmed, measured."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from miaotui.accelerate import texts
from miaotui.accelerate.card.files import read
from miaotui.accelerate.run import Request, accelerate
from miaotui.accelerate.search import sensitivity
from miaotui.accelerate.search.attempt import Plan
from miaotui.accelerate.search.judge import Judge
from miaotui.accelerate.search.space import Candidate, Serving
from miaotui.accelerate.search.trial import Built, Scores
from miaotui.accelerate.search.workshop import RealWorkshop, settings_of
from miaotui.backends.cpu import _native
from miaotui.errors import InterruptedWorkError, UsageError
from miaotui.hardware.ceilings import Probes
from miaotui.measure.quality_data import Window
from miaotui.measure.scoring import Opened, Rows, Settings
from tests.compress import toy_folders

PROBES = Probes(lambda threads, megabytes, seconds: [10.0], lambda t, s: 1.0, lambda t, s: 0.1)
CONFIG = {
    **toy_folders.CONFIG, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "original"
    return toy_folders.write(folder, toy_folders.draw(CONFIG, 0), CONFIG, kind="BF16")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(" ".join(f"w{chance.randrange(96)}" for _ in range(64)) + "\n" for _ in range(400)))
    return path


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIAOTUI_HOME", str(tmp_path / "home"))


def test_an_artefact_and_its_card(toy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy is no faster in int4, or is, as the machine has it: either way the card says what was found."""
    told: list[str] = []
    isa = _native.isas()[0]
    monkeypatch.setenv("MIAOTUI_ISA", isa)
    plan = Plan("memory", 0.5, 8.0)
    request = Request(str(toy), tmp_path / "out", plan, str(text), tasks=("needle",), command="miaotui accelerate …")
    card = accelerate(request, PROBES, tell=told.append)
    assert card.plain() == read(tmp_path / "out").plain()
    assert {"README.md", "report.html", "card.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert card.search.trials
    assert all(trial.why for trial in card.search.trials)
    assert card.speed.before
    assert card.quality.before.perplexity.value > 1
    assert card.machine["isa_level"] == isa
    assert all(command.startswith(f"MIAOTUI_ISA={isa} miaotui ") for command in card.commands)
    assert bool(card.artefact.kept_original) == (card.quality.after is None)
    if not card.artefact.kept_original:
        assert card.floor.holds
        Opened.of(str(tmp_path / "out")).load(Settings(), 64).close()
    assert not request.work.exists()
    with pytest.raises(UsageError, match="is there already"):
        accelerate(request, PROBES)


def test_a_stopped_search_goes_on_and_another_begins_anew(
    toy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(str(toy), tmp_path / "out", Plan("memory", 0.5, 8.0), str(text))
    built: list[str] = []

    def stopped(self: RealWorkshop, candidate: Candidate, windows: range) -> Scores:
        raise KeyboardInterrupt

    whole = RealWorkshop.build

    def counted(self: RealWorkshop, candidate: Candidate) -> Built:
        built.append(candidate.key)
        return whole(self, candidate)

    monkeypatch.setattr(RealWorkshop, "score", stopped)
    monkeypatch.setattr(RealWorkshop, "build", counted)
    for _ in range(2):
        with pytest.raises(InterruptedWorkError, match="same command again"):
            accelerate(request, PROBES)
    assert len(built) == 1
    with pytest.raises(UsageError, match=r"the floor changed.*--restart"):
        accelerate(replace(request, plan=Plan("memory", 0.4, 8.0)), PROBES)
    (request.work / "original").mkdir()
    (request.work / "original" / "nll-0.npy").write_text("of another search")
    with pytest.raises(InterruptedWorkError):
        accelerate(request, PROBES, restart=True)
    assert not (request.work / "original").exists()
    assert len(built) == 2


def test_texts_have_nothing_in_common(text: Path, tmp_path: Path) -> None:
    found = texts.prepare(str(text), None, tmp_path)
    choose, confirm = (set(path.read_text().splitlines()) for path in (found.choose, found.confirm))
    assert not choose & confirm
    assert choose | confirm == set(text.read_text().splitlines())
    prose = texts.prepare(None, None, tmp_path)
    pieces = [Path(prose.calibrate).read_text(), prose.choose.read_text(), prose.confirm.read_text()]
    assert len(pieces[0]) == pytest.approx(2 * len(pieces[1]), rel=0.05)
    paragraphs = [{one for one in whole.split("\n\n") if len(one) >= texts.SHORT} for whole in pieces]
    assert not paragraphs[0] & paragraphs[1]
    assert not paragraphs[0] & paragraphs[2]
    assert not paragraphs[1] & paragraphs[2]


def test_one_text_for_both_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibrated on and measured on"):
        texts.prepare(str(text), str(text), tmp_path)


def test_the_judge_agrees_with_both_models_side_by_side(toy: Path, tmp_path: Path) -> None:
    changed = toy_folders.draw(CONFIG, 1, near=toy_folders.draw(CONFIG, 0))
    other = toy_folders.write(tmp_path / "other", changed, CONFIG, kind="BF16")
    chance = np.random.default_rng(0)
    windows = [Window(chance.integers(0, 96, 48).astype(np.int32)) for _ in range(6)]
    original = Opened.of(str(toy))
    judge = Judge(original, windows, tmp_path / "judge")
    first = judge.scores(str(other), settings_of(Serving()), range(0, 4))
    second = judge.scores(str(other), settings_of(Serving()), range(4, 6))
    judge.close()
    found = first + second
    assert (len(found), len(found.kl)) == (6, 4)
    exact, mine = (
        original.load(Settings(compute="fp32", kv_cache_dtype="fp32"), 48),
        Opened.of(str(other)).load(Settings(), 48),
    )
    with Rows() as rows:
        for at, window in enumerate(windows):
            wanted = rows.divergence(exact, mine, window)
            assert found.nll[at] == pytest.approx(float((wanted.nll - wanted.reference_nll).sum()), abs=1e-9)
            if at < 4:
                assert found.kl[at] == pytest.approx(float(wanted.kl.sum()), abs=1e-9)
    exact.close()
    mine.close()
    assert found.ratio.value > 1.01


def test_what_a_layer_costs(toy: Path, tmp_path: Path) -> None:
    """Only the second layer's mlp_out is changed: nothing else costs anything."""
    arrays = toy_folders.draw(CONFIG, 0)
    arrays["model.layers.1.mlp.down_proj.weight"] = -arrays["model.layers.1.mlp.down_proj.weight"]
    other = toy_folders.write(tmp_path / "other", arrays, CONFIG, kind="BF16")
    tokens = np.arange(90, dtype=np.int32)
    costs = {(c.layer, c.role): c.kl for c in sensitivity.measure(str(toy), str(other), tokens, sensitivity.ROLES)}
    assert len(costs) == 8
    assert costs.pop((1, "mlp_out")) > 0.01
    assert max(costs.values()) < 1e-9
    whole = sensitivity.measure(str(toy), str(other), tokens, sensitivity.roles_of("awq+gptq"))
    assert [(c.layer, c.role, c.kl > 0.01) for c in whole] == [(0, "all", False), (1, "all", True)]
