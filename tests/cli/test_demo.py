"""The commands on the real demo model, in processes of their own, as people run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_main import spawn

pytestmark = pytest.mark.usefixtures("demo_gguf")
GREEDY = ("--temperature", "0", "--max-tokens", "12", "--compute", "fp32")


def parsed(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_answers_and_says_the_same_again() -> None:
    first, second = (spawn("run", "demo", "What is the capital of France?", *GREEDY) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "Paris" in first.stdout
    assert first.stdout == second.stdout
    assert first.stderr == ""


def test_run_by_file_pipe_and_json(demo_gguf: Path) -> None:
    report = parsed(spawn("run", str(demo_gguf), *GREEDY, "--json", stdin="What is the capital of France?"))
    assert "Paris" in report["text"]
    assert 0 < report["completion_tokens"] <= 12


def test_a_seed_gives_the_same_answer() -> None:
    flags = ("--raw", "--seed", "11", "--temperature", "1.1", "--max-tokens", "16")
    one, same = (spawn("run", "demo", "Once upon a time", *flags) for _ in range(2))
    assert one.stdout == same.stdout != ""


def test_peak_memory_is_bounded_by_file_cache_and_150_mb(demo_gguf: Path) -> None:
    report = parsed(spawn("run", "demo", "Hello. " * 100, *GREEDY, "--json"))
    positions = report["prompt_tokens"] + report["completion_tokens"]
    cache = positions * 30 * 2 * 3 * 64 * 2
    assert report["peak_memory_bytes"] <= demo_gguf.stat().st_size + cache + 150e6


def test_nothing_heavy_is_imported_to_run() -> None:
    code = (
        "import sys; from miaotui.cli.main import main; "
        "status = main(['run', 'demo', 'hi', '--max-tokens', '2']); print(*sys.modules, file=sys.stderr); "
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True, timeout=60
    )
    heavy = {"torch", "rich", "huggingface_hub", "transformers", "llguidance", "httpx", "asyncio"}
    assert not heavy & set(done.stderr.split())


def test_bench_and_its_contract() -> None:
    regimes = "start,load,peak-memory,decode-1@16"
    report = parsed(spawn("bench", "demo", "--regimes", regimes, "--repeat", "1", "--json"))
    assert [result["regime"] for result in report["results"]] == regimes.split(",")
    for result in report["results"]:
        assert 0 < result["low"] <= result["median"] <= result["high"]
        assert (result["ceiling"] is None) == (result["regime"] == "start")
    assert report["model"]["family"] == "llama"


def test_doctor_tells_what_the_model_can_do() -> None:
    report = parsed(spawn("doctor", "demo", "--json"))
    model = report["model"]
    assert model["fits"]
    assert model["max_position"] == 8192
    assert model["parameters"] == pytest.approx(134.5e6, rel=0.01)
    assert model["ceilings"]["decode-1@16"] > model["ceilings"]["decode-1@8192"] > 0
    assert report["ceilings"]["bandwidth"] > 0


def test_pull_prints_the_place(demo_gguf: Path) -> None:
    done = spawn("pull", "demo")
    assert (done.returncode, done.stdout.strip()) == (0, str(demo_gguf))


def test_what_can_be_mended_is_said_without_a_traceback(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    for model in ("/nowhere/at/all.gguf", str(damaged), str(tmp_path)):
        done = spawn("run", model, "hi")
        assert (done.returncode, done.stdout) == (1, ""), model
        assert done.stderr.startswith("error: "), model
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 2


def test_a_request_that_cannot_fit_is_refused_with_the_numbers() -> None:
    done = spawn("run", "demo", "hi", "--max-model-len", "64", "--max-tokens", "600")
    assert done.returncode == 1
    assert "600" in done.stderr
    assert "64" in done.stderr


def test_chat_remembers() -> None:
    done = spawn("chat", "demo", *GREEDY, stdin="Name three fruits.\nWhich of them is yellow?\n")
    assert done.returncode == 0, done.stderr
    assert "Banana" in done.stdout.splitlines()[-1]
