"""Batch files: every line answered once, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from miaotui.errors import UsageError
from miaotui.offline.batch import Batch, journal_of, look_at, write_records
from miaotui.offline.cache import ResultCache
from miaotui.offline.format import BadLine, cache_key, deterministic, read_task
from miaotui.offline.journal import Journal

URL = "/v1/completions"


def _line(name: str, **body: Any) -> bytes:
    return json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": body}).encode() + b"\n"


class Answers:
    """An answerer that counts what it was asked, and how much of it at once."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.now = self.most = 0

    async def __call__(self, url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked[str(body["prompt"])] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001 * random.random())
        self.now -= 1
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        return (400, {"error": {}}) if body["prompt"] == "bad" else (200, {"text": body["prompt"], "usage": usage})


def _run(path: Path, answers: Any, width: int = 8, cache: ResultCache | None = None) -> tuple[list[Any], Batch]:
    output = path.with_suffix(".out")
    with Journal(journal_of(output), {"input": "x"}, look_at(path).lines) as journal:
        batch = Batch(look_at(path), journal, answers, "model", width, cache)
        asyncio.run(batch.run())
        write_records(journal, output)
        journal.remove()
    return [json.loads(line) for line in output.read_text().splitlines()], batch


def test_lines_come_out_in_order(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(_line(f"n{i}", prompt=str(i)) for i in range(200)))
    answers = Answers()
    records, batch = _run(path, answers)
    assert [record["custom_id"] for record in records] == [f"n{i}" for i in range(200)]
    assert [record["response"]["body"]["text"] for record in records] == [str(i) for i in range(200)]
    assert len({record["id"] for record in records}) == 200
    assert answers.most == 8, "as many as may be, and no more"
    assert (batch.progress.done, batch.progress.failed, batch.progress.completion_tokens) == (200, 0, 600)


def test_a_bad_line_is_a_record(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [_line("a", prompt="1"), b"{\n", b"\xff\xfe\n", _line("a", prompt="2"), _line("b", prompt="bad")]
    path.write_bytes(b"".join([*lines, _line("c", prompt="3").rstrip()]))
    records, batch = _run(path, Answers())
    codes = [(record["error"] or {}).get("code") for record in records]
    assert codes == [None, "invalid_line", "invalid_line", "duplicate_custom_id", None, None]
    assert [(record["response"] or {}).get("status_code") for record in records] == [200, None, None, None, 400, 200]
    assert batch.progress.failed == 4


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b"[]", "object"),
        (b'{"method": "POST"}', "custom_id"),
        (b'{"custom_id": 3}', "custom_id"),
        (b'{"custom_id": "a", "method": "GET"}', "method"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}', "url"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": 1}', "body"),
        (b'{"custom_id": "a", "extra": 1}', "extra"),
    ],
)
def test_what_is_wrong_is_named(line: bytes, cause: str) -> None:
    with pytest.raises(BadLine, match=cause):
        read_task(line)


# -- resuming --------------------------------------------------------------------------------------------
def test_every_cut_of_the_journal_resumes(tmp_path: Path) -> None:
    """Whatever byte the process died at: sound records stay, the torn one is asked again."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(_line(f"n{i}", prompt=str(i)) for i in range(4)))
    whole = tmp_path / "whole"
    with Journal(whole, {"input": "x"}, 4) as journal:
        asyncio.run(Batch(look_at(path), journal, Answers(), "model", 2).run())
    content = whole.read_bytes()
    for cut in range(len(content) + 1):
        torn = tmp_path / "torn"
        torn.write_bytes(content[:cut])
        answers = Answers()
        with Journal(torn, {"input": "x"}, 4) as journal:
            kept = journal.done
            asyncio.run(Batch(look_at(path), journal, answers, "model", 2).run())
            records = list(journal.records())
        assert [record["custom_id"] for record in records] == ["n0", "n1", "n2", "n3"]
        assert answers.asked.total() == 4 - kept
        assert kept == max(content[:cut].count(b"\n") - 1, 0)


def test_a_damaged_record_ends_what_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"input": "x"}, 3) as journal:
        for i in range(3):
            journal.add(i, {"i": i})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"i":1', b'"i":7'), lines[3]]))
    with Journal(path, {"input": "x"}, 3) as journal:
        assert list(journal.records()) == [{"i": 0}]


def test_another_batch_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"input": "x", "model": "m"}, 1).close()
    with pytest.raises(UsageError, match="the model changed"):
        Journal(tmp_path / "j", {"input": "x", "model": "other"}, 1)


# -- the cache -------------------------------------------------------------------------------------------
def test_the_same_is_asked_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    same = [_line(f"s{i}", prompt="same", temperature=0, user=f"u{i}") for i in range(20)]
    sampled = [_line(f"r{i}", prompt="random", temperature=1) for i in range(3)]
    failing = [_line(f"f{i}", prompt="bad", temperature=0) for i in range(2)]
    path.write_bytes(b"".join([*same, *sampled, *failing]))
    cache = ResultCache(tmp_path / "cache")
    first = Answers()
    records, batch = _run(path, first, cache=cache)
    assert first.asked == {"same": 1, "random": 3, "bad": 2}, "errors are not kept"
    assert batch.progress.from_cache == 19
    assert len({record["id"] for record in records}) == 25
    second = Answers()
    again, _ = _run(path, second, cache=cache)
    assert second.asked == {"random": 3, "bad": 2}
    assert [r["response"]["body"] for r in again] == [r["response"]["body"] for r in records]
    cache.close()


def test_what_a_key_holds() -> None:
    key = cache_key("m", URL, {"prompt": "a", "temperature": 0})
    assert key == cache_key("m", URL, {"temperature": 0, "prompt": "a", "user": "me"})
    assert key != cache_key("n", URL, {"prompt": "a", "temperature": 0})
    assert key != cache_key("m", URL, {"prompt": "a", "temperature": 0, "max_tokens": 1})
    assert deterministic({"seed": 0})
    assert not deterministic({"temperature": 0.1})


# -- the command, on the real model ----------------------------------------------------------------------
@pytest.mark.parametrize(("lines", "kills"), [(60, 3), pytest.param(500, 10, marks=pytest.mark.slow)])
def test_kill_at_any_moment(demo_gguf: Path, tmp_path: Path, lines: int, kills: int) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": str(demo_gguf), "temperature": 0, "ignore_eos": True}
    source.write_bytes(
        b"".join(_line(f"n{i}", prompt=f"Number {i} is", max_tokens=8 + i % 20, **body) for i in range(lines))
    )
    command = [sys.executable, "-m", "miaotui.cli.main", "batch", str(source), str(output), "--model", str(demo_gguf)]
    command += ["--max-num-seqs", "4", "--json"]
    dice = random.Random(7)
    journal, done = journal_of(output), 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = done + dice.randint(1, lines // kills - 1)
        while (count := _records(journal)) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it had ended before"
        assert not output.exists()
        done = count
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    summary = json.loads(finished.stdout)
    assert summary["resumed"] >= done > 0
    assert (summary["lines"], summary["failed"]) == (lines, 0)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["custom_id"] for record in records] == [f"n{i}" for i in range(lines)]
    for i, record in enumerate(records):
        assert record["response"]["body"]["usage"]["completion_tokens"] == 8 + i % 20
    assert not journal.exists()


def _records(journal: Path) -> int:
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def test_ctrl_c_keeps_what_is_done(demo_gguf: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": str(demo_gguf), "temperature": 0, "ignore_eos": True, "max_tokens": 30}
    source.write_bytes(b"".join(_line(f"n{i}", prompt=f"Number {i} is", **body) for i in range(200)))
    command = [sys.executable, "-m", "miaotui.cli.main", "batch", str(source), str(output), "--model", str(demo_gguf)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while _records(journal_of(output)) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "are kept. \nRun the same command again" in said.replace("kept.\n", "kept. \n")
    assert "Traceback" not in said
    assert _records(journal_of(output)) >= 5


def test_files_that_are_in_the_way(demo_gguf: Path, tmp_path: Path) -> None:
    from miaotui.cli.main import main

    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    arguments = ["batch", str(source), str(output), "--model", str(demo_gguf)]
    assert main(arguments) == 2, "no input"
    source.write_bytes(b"\n")
    assert main(arguments) == 2, "an empty one"
    source.write_bytes(_line("a", prompt="x", model=str(demo_gguf), max_tokens=1))
    output.write_text("precious")
    assert main(arguments) == 2
    assert output.read_text() == "precious"
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads(output.read_text())["custom_id"] == "a"
