"""Why each technique was kept or dropped, told with the figures that decided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from miaotui.accelerate.card.schema import Technique
from miaotui.accelerate.compose import trial_of
from miaotui.accelerate.explain import techniques, verdict
from miaotui.accelerate.search.attempt import Plan
from miaotui.accelerate.search.journal import Journal
from miaotui.accelerate.search.search import Outcome
from miaotui.accelerate.search.space import Candidate, Space
from miaotui.accelerate.search.trial import Confirmation, Duel
from miaotui.compress.recipe import Recipe
from tests.accelerate.fakes import FakeWorkshop, fake_space, gain_of, loss_of, run_search

DROPPED = (("fp8 weights", "this machine has no kernels that multiply fp8"),)


def told(tmp_path: Path, workshop: FakeWorkshop) -> tuple[Outcome, Space, dict[str, Technique]]:
    space = replace(fake_space(), dropped=DROPPED)
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(workshop, journal, space=space)
    found = techniques(outcome, space)
    assert len({one.name for one in found}) == len(found)
    assert [one.kept for one in found] == sorted((one.kept for one in found), reverse=True)
    assert all(not one.why[0].islower() and one.why.endswith(".") for one in found)
    return outcome, space, {one.name: one for one in found}


def test_what_was_kept_and_what_was_dropped(tmp_path: Path) -> None:
    outcome, _, found = told(tmp_path, FakeWorkshop())
    kept = [name for name, one in found.items() if one.kept]
    assert kept == ["int4 weights in groups of 64", "rounding by gptq", "guessing tokens by ngram"]
    lossy = found["int4 weights in groups of 128"]
    assert "% perplexity" in lossy.why
    assert "over the floor of 1%" in lossy.why
    assert "within the floor of 1%" in found["int4 weights in groups of 64"].why
    assert "3.2" in found["int4 weights in groups of 64"].why or "4.1" in found["int4 weights in groups of 64"].why
    assert "Not tried" in found["int8 weights in whole rows"].why
    assert found["fp8 weights"].why == "This machine has no kernels that multiply fp8."
    assert outcome.winner is not None
    assert verdict(outcome).startswith(outcome.winner.name)


def test_keeping_the_original_names_the_closest(tmp_path: Path) -> None:
    workshop = FakeWorkshop(
        loss=lambda c: 0.0 if c.recipe is None else 0.03 + loss_of(c),
        gain=lambda c: 0.9 if c.serving.speculative else 1.0 if c.recipe is None else gain_of(c),
    )
    outcome, _, found = told(tmp_path, workshop)
    assert outcome.winner is None
    assert not any(one.kept for one in found.values())
    sentence = verdict(outcome)
    assert sentence.startswith("Keep the original: nothing tried is better at latency within the floor of 1%")
    assert outcome.closest is not None
    assert outcome.closest.name in sentence
    assert "% perplexity" in sentence


def test_what_the_last_duel_did_not_bear_out_is_said(tmp_path: Path) -> None:
    class Luck(FakeWorkshop):
        def confirm(self, candidate: Candidate) -> Confirmation:
            even = tuple({"answer": 1.0, "streams": 1.0, "memory": 1.0} for _ in range(9))
            return replace(super().confirm(candidate), duel=Duel(even, even))

    outcome, _, _ = told(tmp_path, Luck())
    assert outcome.winner is None
    assert "not faster for certain" in verdict(outcome)


def test_a_trial_says_what_became_of_it(tmp_path: Path) -> None:
    outcome, _, _ = told(tmp_path, FakeWorkshop(broken=frozenset({"w4g128-sym"})))
    trials = [trial_of(attempt, "answer-512+128") for attempt in outcome.attempts]
    assert [trial.state for trial in trials].count("won") == 1
    assert {trial.state for trial in trials} >= {"won", "failed", "measured"}
    won = next(trial for trial in trials if trial.state == "won")
    assert won.speed is not None
    assert won.speed.median == pytest.approx(3.2 * 1.3, rel=0.03)
    assert won.kl is not None
    failed = next(trial for trial in trials if trial.state == "failed")
    assert failed.why == "There is no room for it."


@pytest.mark.parametrize("cost", [0.0035, 0.05])
def test_fewer_layers_are_tried_once_all_keep_the_floor(tmp_path: Path, cost: float) -> None:
    """Each layer left out costs so much perplexity; the deepest cut within the floor wins."""
    recipe = Recipe(scheme="w8-sym", method="rtn")
    weights = tuple(Candidate(recipe, blocks=blocks) for blocks in (None, 11, 10, 8))
    left_out = lambda c: 12 - (c.blocks or 12)  # noqa: E731
    workshop = FakeWorkshop(
        loss=lambda c: cost * left_out(c) if c.recipe is not None else 0.0,
        gain=lambda c: 1.0 if c.recipe is None else 2 * 12 / (c.blocks or 12),
    )
    space = Space(weights, ())
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(workshop, journal, space=space)
    assert outcome.winner is not None
    assert outcome.winner.candidate.blocks == (10 if cost < 0.01 else None)
    found = {one.name: one for one in techniques(outcome, space)}
    assert found["11 layers left"].kept is False
    if cost < 0.01:
        assert found["10 layers left"].kept
        assert "over the floor" in found["8 layers left"].why
    else:
        assert "over the floor" in found["11 layers left"].why
        assert "Not tried: w8-sym by rtn, 11 layers left already loses 5" in found["8 layers left"].why


def test_what_nothing_was_tried_of_has_a_name(tmp_path: Path) -> None:
    """Where the ceilings promise nothing of any weights, whole models are left out as well: that is no technique."""
    recipe = Recipe(scheme="w8-sym", method="rtn")
    space = Space(tuple(Candidate(recipe, blocks=blocks) for blocks in (None, 11)), ())
    outcome = Outcome(Plan("latency", 0.01, 60.0), None, (), tuple((c, "of a reason") for c in space.weights), 0.0)
    assert [one.name for one in techniques(outcome, space)] == ["int8 weights in whole rows", "11 layers left"]
