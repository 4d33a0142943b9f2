"""The search over a workshop whose every figure is known: honest whatever is planted in it."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from miaotui.accelerate.search.attempt import Plan
from miaotui.accelerate.search.journal import Journal
from miaotui.accelerate.search.sample import in_order
from miaotui.accelerate.search.search import TRIES, TUNING_ROUNDS, Outcome, looks
from miaotui.accelerate.search.space import ORIGINAL, Candidate, Serving, Space
from miaotui.accelerate.search.trial import Confirmation
from miaotui.compress.recipe import Recipe
from tests.accelerate.fakes import LOSSES, FakeWorkshop, fake_space, gain_of, loss_of, noise, run_search

PLAN = Plan("latency", 0.01, 600.0)


def found(tmp_path: Path, workshop: FakeWorkshop, plan: Plan = PLAN, told: list[str] | None = None) -> Outcome:
    with Journal(tmp_path / "journal", {}) as journal:
        return run_search(workshop, journal, plan=plan, told=told)


def scheme(candidate: Candidate) -> str:
    return "" if candidate.recipe is None else candidate.recipe.scheme


def recipe_of(outcome: Outcome) -> tuple[str, str]:
    assert outcome.winner is not None
    recipe = outcome.winner.candidate.recipe
    assert recipe is not None
    return recipe.scheme, recipe.method


# -- what it finds ---------------------------------------------------------------------------------------
def test_the_fastest_that_keeps_the_floor(tmp_path: Path) -> None:
    """gptq brings 64 from 3% to 0.75%, and 128 only to 1.25%; guessing tokens adds a third."""
    outcome = found(tmp_path, FakeWorkshop())
    assert recipe_of(outcome) == ("w4g64-sym", "gptq")
    assert outcome.winner is not None
    assert outcome.winner.candidate.serving == Serving(speculative="ngram")
    assert outcome.winner.floor.holds
    assert outcome.winner.gain is not None
    assert outcome.winner.gain.value == pytest.approx(3.2 * 1.3, rel=0.02)
    assert outcome.winner.confirmation is not None
    assert "4.1" in outcome.winner.why
    assert outcome.spent <= PLAN.budget


@pytest.mark.parametrize(("floor", "wanted"), [(0.06, "w4g128-sym"), (0.006, "w4g32-sym"), (0.0027, "w8-sym")])
def test_the_floor_decides(tmp_path: Path, floor: float, wanted: str) -> None:
    assert recipe_of(found(tmp_path, FakeWorkshop(), Plan("latency", floor, 900.0)))[0] == wanted


def test_every_attempt_and_every_one_left_out_has_its_reason(tmp_path: Path) -> None:
    outcome = found(tmp_path, FakeWorkshop())
    assert all(attempt.why for attempt in outcome.attempts)
    assert all(why for _, why in outcome.skipped)
    tried = {a.candidate.key for a in outcome.attempts}
    assert not tried & {candidate.key for candidate, _ in outcome.skipped}
    assert {c.key for c in fake_space().weights} <= tried | {candidate.key for candidate, _ in outcome.skipped}
    lossy = next(a for a in outcome.attempts if scheme(a.candidate) == "w4g128-sym")
    assert "over the floor of 1%" in lossy.why


# -- what it must not fall for ---------------------------------------------------------------------------
def test_keep_the_original(tmp_path: Path) -> None:
    """Nothing here is both faster and within the floor."""
    workshop = FakeWorkshop(
        loss=lambda c: 0.0 if c.recipe is None else 0.03 + loss_of(c),
        gain=lambda c: gain_of(c) if c.recipe else 0.9 if c.serving.options() else 1.0,
    )
    outcome = found(tmp_path, workshop)
    assert outcome.winner is None
    assert outcome.closest is not None
    assert scheme(outcome.closest.candidate) in LOSSES
    assert not any(call.startswith("confirm") for call in workshop.calls)


def test_a_planted_slow_kernel_is_not_chosen(tmp_path: Path) -> None:
    """The ceiling model loves groups of 64; their kernel runs at half the original's speed."""
    slow = lambda c: 0.5 if scheme(c) == "w4g64-sym" else gain_of(c)  # noqa: E731
    outcome = found(tmp_path, FakeWorkshop(gain=slow))
    assert recipe_of(outcome)[0] == "w4g32-sym"
    told = next(a for a in outcome.attempts if scheme(a.candidate) == "w4g64-sym" and a.gain is not None)
    assert "0.5" in told.why


def test_a_planted_lossy_recipe_is_not_chosen(tmp_path: Path) -> None:
    """Fine on the text that is chosen by, and lost on the text that confirms."""

    class Planted(FakeWorkshop):
        def confirm(self, candidate: Candidate) -> Confirmation:
            true = super().confirm(candidate)
            if scheme(candidate) != "w4g64-sym":
                return true
            lost = {"perplexity_ratio": 1.05, "perplexity_ratio_stderr": 0.001}
            return Confirmation({**lost, "perplexity_ratio_interval": [1.048, 1.052]}, true.duel)

    outcome = found(tmp_path, Planted())
    assert outcome.winner is not None
    assert scheme(outcome.winner.candidate) != "w4g64-sym"
    lost = [a for a in outcome.attempts if a.confirmation is not None and not a.won]
    assert lost
    assert all("on text that nothing was chosen by it loses 5% perplexity" in a.why for a in lost)


def test_what_was_left_out_because_of_a_refuted_one_is_looked_at_after_all(tmp_path: Path) -> None:
    """int8 promises too little beside int4, until the last text shows that int4 loses too much."""

    class Planted(FakeWorkshop):
        def confirm(self, candidate: Candidate) -> Confirmation:
            true = super().confirm(candidate)
            if not scheme(candidate).startswith("w4"):
                return true
            lost = {"perplexity_ratio": 1.05, "perplexity_ratio_stderr": 0.001}
            return Confirmation({**lost, "perplexity_ratio_interval": [1.048, 1.052]}, true.duel)

    assert recipe_of(found(tmp_path, Planted(), Plan("latency", 0.01, 900.0)))[0] == "w8-sym"


@pytest.mark.parametrize("budget", [100.0, 250.0, 900.0])
def test_it_ends_when_everything_is_refuted(tmp_path: Path, budget: float) -> None:
    class Planted(FakeWorkshop):
        def confirm(self, candidate: Candidate) -> Confirmation:
            lost = {"perplexity_ratio": 1.05, "perplexity_ratio_stderr": 0.001}
            return Confirmation({**lost, "perplexity_ratio_interval": [1.048, 1.052]}, super().confirm(candidate).duel)

    outcome = found(tmp_path, Planted(), Plan("latency", 0.01, budget))
    assert outcome.winner is None
    assert outcome.closest is not None
    assert len({c.key for c, _ in outcome.skipped}) == len(outcome.skipped)


def test_one_that_breaks_the_floor_only_a_little_is_not_chosen(tmp_path: Path) -> None:
    """1.1% on all windows: more and more of them are read until the interval says so."""
    workshop = FakeWorkshop(loss=lambda c: 0.011 if scheme(c) == "w4g128-sym" else loss_of(c))
    outcome = found(tmp_path, workshop)
    assert recipe_of(outcome)[0] == "w4g64-sym"


def test_what_cannot_be_built_is_told(tmp_path: Path) -> None:
    outcome = found(tmp_path, FakeWorkshop(broken=frozenset({"w4g64-sym"})))
    assert recipe_of(outcome)[0] == "w4g32-sym"
    failed = [a for a in outcome.attempts if a.failed]
    assert failed
    assert all(a.why == "There is no room for it." for a in failed)


# -- neighbours ------------------------------------------------------------------------------------------
def test_a_noisy_neighbour_is_noticed_and_waited_for(tmp_path: Path) -> None:
    told: list[str] = []
    noisy = iter([0.7] * (TRIES - 1))
    workshop = FakeWorkshop(others=lambda call: next(noisy, 0.0))
    outcome = found(tmp_path, workshop, told=told)
    assert any("other processes took 0.7 cores" in line for line in told)
    assert not any("disturbed" in note for note in outcome.notes)
    assert not any(a.disturbed for a in outcome.attempts)


def test_a_neighbour_that_stays_is_said(tmp_path: Path) -> None:
    workshop = FakeWorkshop(others=lambda call: 0.7)
    outcome = found(tmp_path, workshop)
    assert any("Other processes disturbed" in note for note in outcome.notes)
    first = next(a for a in outcome.attempts if a.gain is not None)
    assert sum(call.startswith(f"duel {first.candidate.key} 3") for call in workshop.calls) >= TRIES


# -- the budget ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [1.0, 30.0, 120.0, 400.0])
def test_the_budget_is_kept(tmp_path: Path, budget: float) -> None:
    """But for what is under way when it ends, and the last measurement."""
    outcome = found(tmp_path, FakeWorkshop(), Plan("latency", 0.01, budget))
    longest = 20 + 64 * 0.05 + 3 * TRIES
    assert outcome.spent <= budget + longest + 19
    if budget < 120:
        assert any("the budget was spent" in why for _, why in outcome.skipped)


def test_looks() -> None:
    assert list(looks(64)) == [8, 16, 32, 64]
    assert list(looks(20)) == [8, 16, 20]
    assert list(looks(4)) == [4]


# -- killed ----------------------------------------------------------------------------------------------
class KilledError(BaseException):
    pass


@dataclass
class Mortal(FakeWorkshop):
    """Dies in the middle of an action, which then never was."""

    dies_after: int = 0

    def _did(self, action: str, seconds: float) -> None:
        if len(self.calls) >= self.dies_after:
            raise KilledError
        super()._did(action, seconds)


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_five_random_moments_it_finds_the_same(tmp_path: Path, seed: int) -> None:
    whole = FakeWorkshop()
    wanted = found(tmp_path / "whole", whole)
    random_ = random.Random(seed)
    journal, calls = tmp_path / "killed", []
    for _ in range(5):
        mortal = Mortal(dies_after=random_.randrange(len(whole.calls) // 4))
        with pytest.raises(KilledError):
            found(journal, mortal)
        calls += mortal.calls
        torn = (journal / "journal").read_bytes()
        if random_.random() < 0.5:  # and was writing when it died
            (journal / "journal").write_bytes(torn + torn[-random_.randrange(2, 40) : -1])
    last = FakeWorkshop()
    outcome = found(journal, last)
    assert seen(outcome) == seen(wanted)
    assert [*calls, *last.calls] == whole.calls


def seen(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [(a.candidate.key, a.stage, a.why) for a in outcome.attempts] + [("spent", "", f"{outcome.spent:.6f}")]


SCRIPT = """
import sys, time
from pathlib import Path
from miaotui.accelerate.search.journal import Journal
from tests.accelerate.fakes import FakeWorkshop, run_search

class Slow(FakeWorkshop):
    def _did(self, action, seconds):
        time.sleep(0.03)
        super()._did(action, seconds)
        with open(sys.argv[2], "a") as log:
            log.write(action + "\\n")

with Journal(Path(sys.argv[1]), {}) as journal:
    print(run_search(Slow(), journal).winner.candidate.key)
"""


def test_kill_9_resumes(tmp_path: Path) -> None:
    with Journal(tmp_path / "whole", {}) as journal:
        whole = FakeWorkshop()
        wanted = run_search(whole, journal).winner
    assert wanted is not None
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "journal"), str(tmp_path / "log")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_bytes())  # noqa: E731
    for _ in range(2):
        before = started()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            until(lambda: started() > before, process)  # noqa: B023
            time.sleep(random.random() * 0.2)
            process.send_signal(signal.SIGKILL)
    last = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert last.stdout.strip() == wanted.candidate.key
    done = (tmp_path / "log").read_text().splitlines()
    assert list(dict.fromkeys(done)) == list(dict.fromkeys(whole.calls))
    assert len(done) - len(whole.calls) <= 2  # what was done and not yet written down when it was killed


def until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not true():
        assert process.poll() is None
        time.sleep(0.01)


# -- who chooses -----------------------------------------------------------------------------------------
def test_the_sampler_finds_no_worse_than_the_order(tmp_path: Path) -> None:
    plan = Plan("latency", 0.01, 150.0)
    with Journal(tmp_path / "a", {}) as journal:
        ordered = run_search(FakeWorkshop(), journal, plan=plan, pick=in_order)
    sampled = found(tmp_path, FakeWorkshop(), plan)
    assert ordered.winner is not None
    assert sampled.winner is not None
    assert sampled.winner.value >= 0.99 * ordered.winner.value


def test_the_original_served_better_may_win(tmp_path: Path) -> None:
    """Weights that lose too much leave the original's, which guessing tokens makes faster at no loss at all."""
    outcome = found(tmp_path, FakeWorkshop(loss=lambda c: 0.0 if c.recipe is None else 0.1))
    assert outcome.winner is not None
    assert outcome.winner.candidate == ORIGINAL.served(speculative="ngram")
    assert outcome.winner.exact


# -- what rounding does to the weights ---------------------------------------------------------------------
ROUNDING = {"w4g128-sym": 4e-2, "w4g64-sym": 3e-2, "w4g32-sym": 2e-2, "w8-sym": 1e-4}


def test_the_safest_comes_first(tmp_path: Path) -> None:
    space = replace(fake_space(), rounding=ROUNDING)
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(FakeWorkshop(), journal, space=space)
    assert scheme(outcome.attempts[0].candidate) == "w8-sym"
    assert recipe_of(outcome) == ("w4g64-sym", "gptq")


def test_what_must_lose_far_too_much_is_not_built(tmp_path: Path) -> None:
    """int4 in groups of 32 is 20% off by plain rounding: in groups of 128 it must be more than any method saves."""
    space = replace(fake_space(), rounding=ROUNDING)
    workshop = FakeWorkshop(loss=lambda c: 30 * loss_of(c) if scheme(c).startswith("w4") else loss_of(c))
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(workshop, journal, space=space)
    assert recipe_of(outcome)[0] == "w8-sym"
    assert sum(scheme(a.candidate).startswith("w4") for a in outcome.attempts) == 1
    reasons = [why for candidate, why in outcome.skipped if scheme(candidate).startswith("w4")]
    assert any("rounding changes its weights" in why for why in reasons)


# -- how it is served ------------------------------------------------------------------------------------
def test_serving_is_tuned_one_change_at_a_time(tmp_path: Path) -> None:
    """Three changes help, each a little: they are found from one another, although all pairs and threes are there."""
    helps = {"compute": 1.2, "kv_cache_dtype": 1.1, "max_num_batched_tokens": 1.08}

    def gain(candidate: Candidate) -> float:
        served = math.prod(helps.get(name, 0.7) for name in candidate.serving.options())
        return (1.0 if candidate.recipe is None else 3.0) * served

    computes, caches, tokens, seats = ("auto", "int8-batch"), ("auto", "int8"), (512, 1024), (64, 128, 32)
    every = [Serving(*c) for c in itertools.product(computes, caches, (None,), (None,), seats, tokens)]
    servings = sorted((s for s in every if s != Serving()), key=lambda s: len(s.options()))
    space = Space((Candidate(Recipe(scheme="w8-sym", method="rtn")),), tuple(servings))
    plan = Plan("throughput", 0.01, 600.0)
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(FakeWorkshop(gain=gain), journal, plan=plan, space=space, pick=in_order)
    assert outcome.winner is not None
    assert outcome.winner.candidate.serving == Serving("int8-batch", "int8", max_num_batched_tokens=1024)


def test_weights_that_need_exact_activations_are_not_recoded(tmp_path: Path) -> None:
    def loss(candidate: Candidate) -> float:
        return 0.0 if candidate.recipe is None or candidate.serving.compute == "fp32" else 0.015

    servings = (Serving("int8-batch"), Serving(kv_cache_dtype="int8"))
    weights = tuple(Candidate(Recipe(scheme="w8-sym", method="rtn"), Serving(c)) for c in ("auto", "fp32"))
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(FakeWorkshop(loss=loss), journal, space=Space(weights, servings))
    assert outcome.winner is not None
    assert {a.candidate.serving.compute for a in outcome.attempts} == {"auto", "fp32"}


@pytest.mark.parametrize("seed", range(4))
def test_ways_to_serve_are_told_apart_on_a_machine_that_changes(tmp_path: Path, seed: int) -> None:
    """From duel to duel the original's share of the machine moves by a third: beside one another they still differ."""
    helps = {"compute": 1.1, "kv_cache_dtype": 1.06}

    def gain(candidate: Candidate) -> float:
        served = math.prod(helps.get(name, 0.7) for name in candidate.serving.options())
        return (1.0 if candidate.recipe is None else 3.0) * served

    def slow(candidate: Candidate, call: int) -> float:
        return 1.0 if candidate.recipe is None else 1.0 + 0.2 * noise("state", seed, call)

    servings = (Serving("int8-batch"), Serving(kv_cache_dtype="int8"), Serving("int8-batch", "int8"))
    space = Space((Candidate(Recipe(scheme="w8-sym", method="rtn")),), servings)
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(FakeWorkshop(gain=gain, slow=slow), journal, space=space, pick=in_order)
    assert outcome.winner is not None
    assert outcome.winner.candidate.serving == Serving("int8-batch", "int8")
    tuned = [a for a in outcome.attempts if a.rival is not None]
    assert [a.lead.value for a in tuned if a.lead is not None] == pytest.approx([1.1, 1.06, 1 / 1.1], rel=0.02)
    assert all(a.gain == a.lead.times(a.rival.gain) for a in tuned if a.lead and a.rival and a.rival.gain)


def test_a_way_that_leads_by_chance_is_not_taken(tmp_path: Path) -> None:
    """Its first five rounds happen to be a tenth quicker; rounds of their own then say that nothing was gained."""
    lucky, met = Serving(max_num_seqs=32), list[int]()

    def slow(candidate: Candidate, call: int) -> float:
        if candidate.serving != lucky:
            return 1.0
        met.append(call)
        return 0.9 if call == met[0] else 1.0

    space = Space((Candidate(Recipe(scheme="w8-sym", method="rtn")),), (lucky,))
    with Journal(tmp_path / "journal", {}) as journal:
        outcome = run_search(FakeWorkshop(gain=lambda c: 3.0 if c.recipe else 1.0, slow=slow), journal, space=space)
    assert outcome.winner is not None
    assert outcome.winner.candidate.serving == Serving()
    tried = next(a for a in outcome.attempts if a.candidate.serving == lucky)
    assert len(tried.duel) == 2 * TUNING_ROUNDS
    assert "not told to be better" in tried.why
