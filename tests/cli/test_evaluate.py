"""`miaotui evaluate` and `compare`: what they print, and how they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miaotui.cli import progress as bars
from miaotui.cli.compare import verdict
from miaotui.cli.main import main
from miaotui.errors import UsageError

FIGURE = {"perplexity": 20.0, "stderr": 1.0, "perplexity_interval": [18.0, 22.0]}
WHERE = {"tokens": 2046, "windows": 2, "data": "a.txt", "settings": {"window": 1024}, "notes": ["Mind this."]}


def estimates(**values: float) -> dict[str, Any]:
    return {
        key: found
        for name, value in values.items()
        for key, found in ((name, value), (f"{name}_stderr", value / 10), (f"{name}_interval", [value, value]))
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """How `evaluate` and `compare` were called; they answer at once."""
    calls: list[tuple[Any, ...]] = []

    def evaluate(model: str, source: str | None, *, tell: Callable[[int, int], None], **given: Any) -> dict[str, Any]:
        calls.append((model, source, given))
        if source == "bad.txt":
            raise UsageError("bad.txt is not UTF-8 (byte 7).", "Convert it.")
        tell(1, 2)
        if given["reference"] is None:
            return {**FIGURE, **WHERE, "model": model}
        figures = estimates(perplexity_ratio=1.01, kl_mean=0.0123, kl_p99=0.2, top1_flips=0.034, greedy_agreement=31.5)
        return {**FIGURE, **WHERE, **figures, "greedy_tokens": 64, "reference": {**FIGURE, "model": "o"}}

    def compare(models: list[str], source: str | None, **given: Any) -> dict[str, Any]:
        calls.append((models, source, given))
        ratio = estimates(perplexity_ratio=1.01)
        return {**WHERE, **ratio, "p_value": 0.5, "models": [{"model": model, **FIGURE} for model in models]}

    monkeypatch.setattr("miaotui.measure.quality.evaluate", evaluate)
    monkeypatch.setattr("miaotui.measure.quality.compare", compare)
    return calls


def test_for_people(asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "2,046 tokens in 2 windows of 1024, from a.txt\nperplexity      20.00 ± 1.00  (95%: 18.00 to 22.00)\n"
    )
    assert err == "note: Mind this.\n"
    model, source, given = asked[0]
    assert (model, source) == ("m", None)
    assert (given["cut"].size, given["cut"].stride, given["cut"].most) == (1024, None, None)


def test_with_a_reference(asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    words = "evaluate m --data a.txt --reference o --agreement 64 --window 64 --stride 32 --max-windows 3 --threads 1"
    assert main([*words.split(), "--kv-cache-dtype", "int8", "--reference-kv-cache-dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    for said in (
        "  reference     20.00",
        "  ratio         1.0100",
        "KL mean         0.0123",
        "flips     3.40%",
        "of 64",
    ):
        assert said in out
    given = asked[0][2]
    assert (given["cut"].size, given["cut"].stride, given["cut"].most) == (64, 32, 3)
    assert given["settings"].kv_cache_dtype == "int8"
    assert (given["reference"].model, given["reference"].agreement) == ("o", 64)
    how = given["reference"].settings
    assert (how.compute, how.kv_cache_dtype, how.threads) == ("fp32", "bf16", 1)


def test_json_alone_on_stdout(asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["evaluate", "m"], ["compare", "a", "b"]):
        assert main([*words, "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["windows"] == 2
        assert err == ""


def test_refusals(asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["evaluate", "m", "--data", "bad.txt"],
        ["evaluate", "m", "--agreement", "8"],
        ["evaluate", "m", "--window", "1"],
        ["evaluate", "m", "--window", "8", "--stride", "9"],
        ["compare", "a"],
    ):
        assert main(words) == 2, words
        out, err = capsys.readouterr()
        assert out == ""
        assert err


def test_comparison(asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "first", "second"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("A ")
    assert lines[1].endswith("first")
    assert lines[2].endswith("second")
    assert "cannot be told apart" in lines[-1]


@pytest.mark.parametrize(
    ("ratio", "p", "interval", "said"),
    [
        (1.012, 1e-9, [1.008, 1.016],
         "B is worse: its perplexity is 1.20% higher (95%: +0.80% to +1.60%, paired over 2 windows, p < 0.0001)."),
        (0.9, 0.013, [0.85, 0.95],
         "B is better: its perplexity is 10.00% lower (95%: -15.00% to -5.00%, paired over 2 windows, p = 0.013)."),
        (1.001, 0.41, [0.998, 1.004],
         "A and B cannot be told apart here: of B, its perplexity is 0.10% higher (95%: -0.20% to +0.40%, paired over "
         "2 windows, p = 0.41)."),
        (1.0, 1.0, [1.0, 1.0], "No difference: A and B give every token the same probability."),
        (1.2, None, None, "One token is too little to tell A and B apart."),
    ],
)  # fmt: skip
def test_verdicts(ratio: float, p: float | None, interval: list[float] | None, said: str) -> None:
    report = {"perplexity_ratio": ratio, "perplexity_ratio_interval": interval, "p_value": p, "windows": 2}
    assert verdict(report) == said


def test_a_bar_for_long_work_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        with bars.progress("counting") as tell:
            for done in range(4):
                tell(done, 3)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("counting" in err) == terminal


def test_the_demo(demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "Water boils at a hundred degrees, and freezes at zero. " * 8})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]})
    )
    words = ["evaluate", str(demo_gguf), "--data", str(tmp_path / "a.jsonl"), "--window", "32", "--json"]
    assert main([*words, "--reference", str(demo_gguf), "--agreement", "4", "--max-windows", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["windows"], report["tokens"]) == (3, 93)
    assert report["perplexity_ratio"] == pytest.approx(1, abs=0.1)
    assert 0 < report["kl_mean"] < report["kl_p99"] < 1
    assert report["reference"]["settings"]["compute"] == "fp32"
