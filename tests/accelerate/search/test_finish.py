"""Which regimes the last measurements have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from miaotui.accelerate.goals import Goal
from miaotui.accelerate.search.finish import FIRST, Finish
from miaotui.accelerate.search.space import ORIGINAL
from miaotui.measure import profile, speed


def fitting(longest: int, seconds: float, goal: Goal = "latency") -> list[str]:
    """For a model with that context, each regime taking a tenth of a second."""
    costs = dict.fromkeys(speed.regimes(), 0.1)
    source = SimpleNamespace(spec=SimpleNamespace(max_position=longest))
    predictor: Any = SimpleNamespace(source=source, regime_seconds=lambda candidate: costs)
    return Finish(None, predictor, None, goal, print).fitting(None, seconds)  # type: ignore[arg-type]


def test_all_where_there_is_time() -> None:
    assert set(fitting(8192, 1e6)) == set(speed.regimes())


@pytest.mark.parametrize(
    ("longest", "without"),
    [
        (545, set()),
        (544, {"decode-1@512"}),
        (512, {"prefill-512", "decode-1@512"}),
        (128, {"prefill-512", "decode-1@512", "throughput-8", "throughput-64"}),
    ],
)
def test_none_that_is_longer_than_the_context(longest: int, without: set[str]) -> None:
    assert set(fitting(longest, 1e6)) == set(speed.regimes()) - without


def test_the_first_that_fits_is_measured_whatever_the_time() -> None:
    assert fitting(8192, 0.0) == [FIRST["latency"][0]]
    assert fitting(512, 0.0) == ["peak-memory"]


def test_regimes_are_measured_without_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prompts are random, and what follows such repeats as no text does."""
    asked: list[speed.Settings] = []
    report = {"results": [{"regime": "prefill-512"}]}
    monkeypatch.setattr(speed, "run_beside", lambda settings, *_, **__: asked.extend(settings) or [report, report])
    monkeypatch.setattr(profile, "run", lambda settings, *_, **__: asked.append(settings) or {})
    costs = dict.fromkeys(speed.regimes(), 0.1)
    source = SimpleNamespace(spec=SimpleNamespace(max_position=1024))
    predictor: Any = SimpleNamespace(source=source, regime_seconds=lambda candidate: costs)
    ledger: Any = SimpleNamespace(note=lambda name, action: action())
    winner = ORIGINAL.served(speculative="ngram", kv_cache_dtype="int8")
    Finish(ledger, predictor, None, "latency", print).measure("one", winner, "other", 60.0)  # type: ignore[arg-type]
    assert [(one.model, one.options) for one in asked] == [
        ("one", {}),
        ("other", {"kv_cache_dtype": "int8"}),
        ("other", {"kv_cache_dtype": "int8"}),
    ]
    assert all(one.flags[one.flags.index("--speculative") + 1] == "none" for one in asked)
