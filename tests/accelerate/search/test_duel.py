"""Who is timed beside whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from miaotui.accelerate.goals import Workload
from miaotui.accelerate.search.duel import Duellist, Side, flags_of
from miaotui.accelerate.search.space import ORIGINAL, Serving
from miaotui.accelerate.search.workshop import RealWorkshop
from miaotui.cli import main as cli

RIVAL, CANDIDATE = Side("one", Serving()), Side("one", Serving(kv_cache_dtype="int8"))


def test_rounds_alternate_and_each_figure_is_its_own_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    duellist = Duellist("latency", Workload(), [1, 2, 3], 0)
    order: list[Side] = []

    def measure(side: Side, number: int) -> dict[str, float]:
        order.append(side)
        return {"answer": number + (10.0 if side == RIVAL else 20.0)}

    monkeypatch.setattr(duellist, "_measure", measure)
    monkeypatch.setattr(duellist, "_make_ready", lambda *sides: order.extend(sides))
    duel = duellist.fight(RIVAL, CANDIDATE, 3)
    assert order == [RIVAL, CANDIDATE] * 2 + [CANDIDATE, RIVAL] + [RIVAL, CANDIDATE]
    assert [figures["answer"] for figures in duel.before] == [10, 11, 12]
    assert [figures["answer"] for figures in duel.after] == [20, 21, 22]


def test_only_the_two_that_are_timed_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Loaded:
        def __init__(self, model: str, **options: Any) -> None:
            self.name = f"{model} {options.get('kv_cache_dtype', 'auto')}"

        def close(self) -> None:
            closed.append(self.name)

    monkeypatch.setattr("miaotui.accelerate.search.duel.LLM", Loaded)
    duellist = Duellist("latency", Workload(), [1, 2, 3], 0)
    monkeypatch.setattr(duellist, "_answer", lambda llm, chance, short=False: 1.0)
    duellist.fight(Side("original", Serving()), RIVAL, 1)
    duellist.fight(RIVAL, CANDIDATE, 1)
    assert closed == ["original auto"]
    duellist.rest()
    assert closed == ["original auto", "one auto", "one int8"]


def test_the_workshop_times_beside_the_rival_it_is_given() -> None:
    workshop = object.__new__(RealWorkshop)
    workshop._subject = SimpleNamespace(model="one")  # type: ignore[assignment]
    workshop._judge = SimpleNamespace(rest=lambda: None)  # type: ignore[assignment]
    workshop._duellist = SimpleNamespace(fight=lambda *sides: sides)  # type: ignore[assignment]
    served = ORIGINAL.served(kv_cache_dtype="int8")
    assert workshop.duel(served, 3) == (RIVAL, CANDIDATE, 3)
    assert workshop.duel(ORIGINAL, 3, served) == (CANDIDATE, RIVAL, 3)


def test_flags_are_the_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert flags_of({}) == flags_of({"greedy_screen": True})
    assert flags_of({})[-1] == "--greedy-screen"
    assert flags_of({"greedy_screen": False, "max_num_seqs": 8})[-3:] == ["--no-greedy-screen", "--max-num-seqs", "8"]
    assert cli.main(["run", "nothing.gguf", "hi", *flags_of({"greedy_screen": False, "threads": 1})]) != 0
    told = capsys.readouterr().err
    assert "nothing.gguf" in told
    assert "No such option" not in told
