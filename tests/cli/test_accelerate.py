"""`miaotui accelerate`: what is asked for is what is searched; mistakes are named before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miaotui.accelerate import run as running
from miaotui.cli.main import main
from tests.accelerate.cards import make_card


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests, in place of searches."""
    seen: list[Any] = []

    def accelerate(request: Any, probes: Any, **options: Any) -> Any:
        seen.append((request, options))
        return make_card()

    monkeypatch.setattr(running, "accelerate", accelerate)
    return seen


@pytest.mark.parametrize("floor", ["1%", "0.01", "1.0 %", ".01"])
@pytest.mark.parametrize("budget", ["3m", "180", "180s", "0.05h"])
def test_floors_and_budgets(asked: list[Any], tmp_path: Path, floor: str, budget: str) -> None:
    assert main(["accelerate", "demo", "-o", str(tmp_path / "o"), "--floor", floor, "--budget", budget, "--json"]) == 0
    plan = asked[0][0].plan
    assert (plan.goal, plan.floor, plan.budget) == ("latency", pytest.approx(0.01), 180.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--floor", "1"], "1%"), (["--floor", "0"], "no floor"), (["--floor", "much"], "no floor"),
        (["--budget", "5s"], "no budget"), (["--budget", "soon"], "no budget"), (["--goal", "speed"], "balanced"),
        (["--against", "llama.cpp,ollama"], "knows no 'ollama'"),
    ],
)  # fmt: skip
def test_mistakes(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["accelerate", "demo", "-o", str(tmp_path / "o"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not asked


def test_an_output_is_needed(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accelerate", "demo"]) == 2
    assert "--output" in capsys.readouterr().err


def test_what_is_asked_for_goes_through(asked: list[Any], tmp_path: Path) -> None:
    flags = ["--goal", "memory", "--data", "d.txt", "--seed", "3", "--against", "vllm,vllm,openvino", "--restart"]
    assert main(["accelerate", "demo", "-o", str(tmp_path / "o"), *flags]) == 0
    request, options = asked[0]
    assert (request.plan.goal, request.plan.seed, request.data) == ("memory", 3, "d.txt")
    assert request.against == ("vllm", "openvino")
    assert options["restart"]
    assert options["write"] is None


def test_the_card_goes_to_stdout(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "o")
    assert main(["accelerate", "demo", "-o", out, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == make_card().plain()
    assert f"wrote {out}" in captured.err
    assert main(["accelerate", "demo", "-o", out]) == 0
    short = capsys.readouterr().out
    assert main(["accelerate", "demo", "-o", out, "--explain"]) == 0
    long = capsys.readouterr().out
    assert "int8 cache" in long
    assert "int8 cache" not in short
