"""`miaotui bench serve` from outside: against a small fake server, and against our own with the demo model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miaotui.cli import main as cli
from tests.cli.test_main import ENVIRONMENT, spawn
from tests.measure.fake_server import Fake, serving

QUICK = ["--num-prompts", "3", "--random-input-len", "8", "--random-output-len", "4"]


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


def bench(*arguments: str) -> int:
    return cli.main(["bench", "serve", *arguments])


def test_table_and_saved_file(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goals = ["--goodput", "ttft:60000", "tpot:60000", "--metric-percentiles", "50,99.9"]
    saving = ["--save-result", "--result-dir", str(tmp_path / "new"), "--metadata", "version=1.0", "machine=a b"]
    assert (
        bench("--base-url", fake.url, *QUICK, *goals, *saving, "--header", "X-A=1", "X-B=2", "--api-key", "sk-9") == 0
    )
    shown = capsys.readouterr()
    assert "org/fake at http://127.0.0.1" in shown.out
    assert "3 requests answered, 0 failed" in shown.out
    assert "requests/s (" in shown.out, "goodput"
    assert re.search(r"time to first token +[\d.,]+", shown.out)
    assert "p99.9" in shown.out
    assert {name: fake.headers[-1][name] for name in ("X-A", "X-B")} == {"X-A": "1", "X-B": "2"}
    assert fake.headers[-1]["Authorization"] == "Bearer sk-9"
    assert all(body["ignore_eos"] for body in fake.asked), "random prompts have answers of their full length"

    (file,) = (tmp_path / "new").iterdir()
    assert re.fullmatch(r"openai-infqps-fake-\d{8}-\d{6}\.json", file.name)
    assert str(file) in shown.err
    saved = json.loads(file.read_text())
    assert (saved["version"], saved["machine"], saved["completed"]) == ("1.0", "a b", 3)
    assert "ttfts" not in saved
    assert "sk-9" not in file.read_text()


def test_json_and_details(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hi there", "output_tokens": 2}\n')
    prompts = ["--backend", "openai-chat", "--dataset-name", "custom", "--dataset-path", str(file)]
    more = ["--temperature", "0", "--extra-body", '{"top_k": 3}', "--result-filename", "it.json"]
    saving = ["--save-result", "--save-detailed", "--result-dir", str(tmp_path)]
    assert bench("--base-url", fake.url, "--num-prompts", "2", *prompts, *more, *saving, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["completed"], report["total_output_tokens"], report["total_input_tokens"]) == (2, 4, 6)
    assert "errors" not in report
    assert json.loads((tmp_path / "it.json").read_text())["output_lens"] == [2, 2]
    for body in fake.asked:
        assert (body["temperature"], body["top_k"], "ignore_eos" in body) == (0, 3, False)


def test_nothing_answered_is_status_1(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.faults = ["", "429", "429", "429"]
    assert bench("--base-url", fake.url, *QUICK, "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["failed"] == 3
    assert "HTTP 429" in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset-name", "custom"],
        ["--dataset-path", "x.jsonl"],
        ["--output-len", "5"],
        ["--dataset-name", "sharegpt", "--dataset-path", "x.json", "--random-input-len", "5"],
        ["--burstiness", "2"],
        ["--save-detailed"],
        ["--metadata", "a=b"],
        ["--save-result", "--metadata", "ab"],
        ["--header", "ab"],
        ["--goodput", "ttft"],
        ["--goodput", "itl:5"],
        ["--goodput", "ttft:soon"],
        ["--percentile-metrics", "speed"],
        ["--metric-percentiles", "101"],
        ["--extra-body", "[]"],
        ["--request-rate", "0"],
        ["--base-url", "localhost"],
        ["demo"],
    ],
)
def test_bad_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err


def test_the_key_of_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    assert bench("--base-url", fake.url, *QUICK) == 0
    assert fake.headers[-1]["Authorization"] == "Bearer sk-env"


def test_bench_alone_still_takes_a_model() -> None:
    done = spawn("bench", "nowhere.gguf", "--regimes", "load")
    assert done.returncode == 1
    assert "nowhere.gguf" in done.stderr


@pytest.fixture(scope="module")
def ours(demo_gguf: Path) -> Iterator[str]:
    """The URL of `miaotui serve` with the demo model."""
    command = [sys.executable, "-m", "miaotui.cli.main", "serve", str(demo_gguf), "--port", "0", "--threads", "1"]
    environment = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        found = next((match for line in lines if (match := re.match(r"Ready: (http://\S+)/v1", line))), None)
        try:
            assert found is not None, "the server did not start"
            yield found[1]
        finally:
            server.terminate()
            server.communicate()


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_our_own_server(ours: str, backend: str) -> None:
    flags = [
        "--random-input-len",
        "40",
        "--random-output-len",
        "6",
        "--num-prompts",
        "4",
        "--random-range-ratio",
        "0.5",
    ]
    done = spawn("bench", "serve", "--base-url", ours, "--backend", backend, *flags, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["completed"], report["failures"], report["notes"]) == (4, [], [])
    assert 4 * 3 <= report["total_output_tokens"] <= 4 * 9
    if backend == "openai":
        assert 4 * 20 <= report["total_input_tokens"] <= 4 * 60
    assert 0 < report["mean_ttft_ms"] < report["mean_e2el_ms"]


def test_lengths_are_exact_on_our_own_server(ours: str, demo_gguf: Path) -> None:
    lengths = ["--random-input-len", "33", "--random-output-len", "5", "--num-prompts", "3"]
    for tokenizer in ([], ["--tokenizer", str(demo_gguf)]):
        done = spawn("bench", "serve", "--base-url", ours + "/v1/", *lengths, *tokenizer, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert (report["total_input_tokens"], report["total_output_tokens"]) == (99, 15)
