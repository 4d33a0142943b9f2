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
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from miaotui.cli.batch import _Asked, _identity
from miaotui.cli.main import main
from miaotui.errors import ResourceError, UsageError
from miaotui.offline.batch import Batch, Progress, journal_of, write_records
from miaotui.offline.cache import ResultCache
from miaotui.offline.format import LONGEST_LINE, BadLine, answered, deterministic, read_task, request_key
from miaotui.offline.journal import Journal
from miaotui.offline.source import look_at

URL = "/v1/completions"
AUTO = {"compute": "auto", "kv_cache_dtype": "auto", "device": "auto"}
"""The engine's options that decide answers, when none is given."""


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


def _start(path: Path, answers: Any, journal: Path, width: int = 8, **more: Any) -> Progress:
    """A run that leaves its journal."""
    source = look_at(path)
    with Journal(journal, {"input": source.sha256}, source.lines) as opened:
        return asyncio.run(Batch(source, opened, answers, "model", width, **more).run())


def _run(
    path: Path, answers: Any, width: int = 8, cache: ResultCache | None = None, *, in_order: bool = True
) -> tuple[list[Any], Progress]:
    output, source = path.with_suffix(".out"), look_at(path)
    with Journal(journal_of(output), {"input": source.sha256}, source.lines) as journal:
        progress = asyncio.run(Batch(source, journal, answers, "model", width, cache).run())
        assert write_records(journal, output, in_order=in_order) == source.lines
        journal.remove()
    return [json.loads(line) for line in output.read_text().splitlines()], progress


def test_lines_come_out_in_order(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(_line(f"n{i}", prompt=str(i)) for i in range(200)))
    answers = Answers()
    records, progress = _run(path, answers)
    assert [record["custom_id"] for record in records] == [f"n{i}" for i in range(200)], "blank lines are none"
    assert [record["response"]["body"]["text"] for record in records] == [str(i) for i in range(200)]
    assert len({record["id"] for record in records}) == 200
    assert answers.most == 8, "as many as may be, and no more"
    assert (progress.done, progress.failed, progress.completion_tokens) == (200, 0, 600)


def test_lines_may_come_out_as_they_were_answered(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(_line(f"n{i}", prompt=str(i)) for i in range(3)))

    async def backwards(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        await asyncio.sleep(0.02 * (3 - int(body["prompt"])))
        return 200, {}

    assert [record["custom_id"] for record in _run(path, backwards)[0]] == ["n0", "n1", "n2"]
    assert [record["custom_id"] for record in _run(path, backwards, in_order=False)[0]] == ["n2", "n1", "n0"]


def test_a_bad_line_is_a_record(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [_line("a", prompt="1"), b"{\n", b"\xff\xfe\n", _line("a", prompt="2"), _line("b", prompt="bad")]
    path.write_bytes(b"".join([*lines, _line("c", prompt="3").rstrip()]))
    records, progress = _run(path, Answers())
    codes = [(record["error"] or {}).get("code") for record in records]
    assert codes == [None, "invalid_line", "invalid_line", "duplicate_custom_id", None, None]
    assert [(record["response"] or {}).get("status_code") for record in records] == [200, None, None, None, 400, 200]
    assert progress.failed == 4


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


def test_a_line_has_bounds(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(_line("a", prompt="x" * LONGEST_LINE) + _line("b", prompt="1") + b"y" * (3 * LONGEST_LINE))
    records, _ = _run(path, Answers())
    assert [(record["error"] or {}).get("code") for record in records] == ["invalid_line", None, "invalid_line"]
    exact = _line("c", prompt="")
    path.write_bytes(_line("c", prompt="x" * (LONGEST_LINE - len(exact))))
    assert _run(path, Answers())[0][0]["response"]["status_code"] == 200


def test_the_input_is_read_as_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(_line(f"n{i}", prompt=str(i)) for i in range(3000)))
    source = look_at(path)

    async def never(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        await asyncio.sleep(60)
        raise AssertionError

    async def run(batch: Batch) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batch.run(), 0.2)

    with Journal(tmp_path / "j", {}, source.lines) as journal:
        batch = Batch(source, journal, never, "model", 8)
        asyncio.run(run(batch))
        assert len(batch._seen) == 256, "one reading ahead"


# -- resuming --------------------------------------------------------------------------------------------
def test_every_cut_of_the_journal_resumes(tmp_path: Path) -> None:
    """Whatever byte the process died at: sound records stay, the torn one is asked again."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(_line(f"n{i}", prompt=str(i)) for i in range(4)))
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    source = look_at(path)
    _start(path, Answers(), whole)
    content = whole.read_bytes()
    for cut in range(len(content) + 1):
        torn.write_bytes(content[:cut])
        kept = max(content[:cut].count(b"\n") - 1, 0)
        with Journal(torn, {"input": source.sha256}, 4) as journal:
            assert journal.done == kept
            assert torn.read_bytes() == content[: content[:cut].rfind(b"\n") + 1] or not kept
            for i in set(range(4)) - {i for i in range(4) if i in journal}:
                journal.add(i, answered(f"n{i}", 200, {}))
            assert [record["custom_id"] for record in journal.records()] == ["n0", "n1", "n2", "n3"]
    torn.write_bytes(content[:-20])
    answers = Answers()
    assert _start(path, answers, torn).before == 3
    assert answers.asked.total() == 1


def test_a_damaged_record_ends_what_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"input": "x"}, 3) as journal:
        for i in range(3):
            journal.add(i, answered(f"n{i}", 200, {"i": i}))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"i":1', b'"i":7'), lines[3]]))
    with Journal(path, {"input": "x"}, 3) as journal:
        assert [record["custom_id"] for record in journal.records()] == ["n0"]


def test_another_batch_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"input": "x", "model": "m"}, 1).close()
    with pytest.raises(UsageError, match="the model changed"):
        Journal(tmp_path / "j", {"input": "x", "model": "other"}, 1)
    with Journal(tmp_path / "j", {"input": "x", "model": "other"}, 1, restart=True) as journal:
        journal.add(0, answered("a", 200, {}))
    with Journal(tmp_path / "j", {"input": "x", "model": "other"}, 1) as journal:
        assert journal.done == 1


@pytest.mark.parametrize("content", [b"precious\n", b"precious", b"0badcafe, a poem", b"0badcafe {}\nmore\n"])
@pytest.mark.parametrize("restart", [False, True])
def test_another_file_is_left_alone(tmp_path: Path, content: bytes, restart: bool) -> None:
    path = tmp_path / "out.jsonl.journal"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no journal"):
        Journal(path, {"input": "x"}, 1, restart=restart)
    assert path.read_bytes() == content


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {}, 1) as first:
        with pytest.raises(UsageError, match="Another process"):
            Journal(tmp_path / "j", {}, 1)
        first.add(0, answered("a", 200, {}))
    with Journal(tmp_path / "j", {}, 1) as second:
        assert second.done == 1
        second.remove()
    assert not (tmp_path / "j").exists()


def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(_line("a", prompt="1"))

    async def meddle(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        path.write_bytes(path.read_bytes() + b"more")
        return 200, {}

    with pytest.raises(UsageError, match="was changed"):
        _start(path, meddle, tmp_path / "j")


@pytest.mark.parametrize("error", [ResourceError("The engine has failed.", "Ask why."), OSError(28, "No space left")])
def test_what_ends_a_batch_is_told_as_it_is(tmp_path: Path, error: Exception) -> None:
    """Not as a group of exceptions; what was done before is kept, with how much of it failed."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(_line(f"n{i}", prompt="bad" if i == 1 else str(i)) for i in range(9)))
    answers = Answers()

    async def fail(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["prompt"] == "5":
            raise error
        return await answers(url, body)

    with pytest.raises(type(error)) as raised:
        _start(path, fail, tmp_path / "j", width=1)
    assert raised.value is error
    progress = _start(path, answers, tmp_path / "j")
    assert (progress.before, progress.done, progress.failed) == (5, 9, 1)
    assert max(answers.asked.values()) == 1


# -- the same, asked again -------------------------------------------------------------------------------
def test_the_same_is_asked_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    same = [_line(f"s{i}", prompt="same", temperature=0, user=f"u{i}") for i in range(20)]
    sampled = [_line(f"r{i}", prompt="random", temperature=1) for i in range(3)]
    failing = [_line(f"f{i}", prompt="bad", temperature=0) for i in range(4)]
    path.write_bytes(b"".join([*same, *sampled, *failing]))
    answers = Answers()
    records, progress = _run(path, answers)
    assert answers.asked == {"same": 1, "random": 3, "bad": 4}, "errors are not kept"
    assert progress.reused == 19
    assert len({record["id"] for record in records}) == 27
    assert [(record["response"]["body"]).get("text") for record in records[:20]] == ["same"] * 20
    assert progress.completion_tokens == 4 * 3, "of those that were made"


def test_the_same_is_asked_once_also_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(_line(f"n{i}", prompt=str(i % 5), seed=1) for i in range(20)))
    _start(path, Answers(), tmp_path / "j", width=1)
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join(lines[:7]))
    answers = Answers()
    progress = _start(path, answers, tmp_path / "j")
    assert (progress.before, progress.reused, answers.asked.total()) == (6, 14, 0)


def test_the_cache_answers_other_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b"".join(_line(f"a{i}", prompt=str(i), temperature=0) for i in range(9)))
    second.write_bytes(b"".join(_line(f"b{i}", prompt=str(i), temperature=0) for i in range(6, 12)))
    with closing(ResultCache(tmp_path / "cache")) as cache:
        _run(first, Answers(), cache=cache)
    answers = Answers()
    with closing(ResultCache(tmp_path / "cache")) as cache:
        records, progress = _run(second, answers, cache=cache)
    assert sorted(answers.asked) == ["10", "11", "9"]
    assert progress.reused == 3
    assert [record["response"]["body"]["text"] for record in records] == [str(i) for i in range(6, 12)]


def test_a_cache_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match="cannot be used"):
        ResultCache(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "answers.sqlite").write_bytes(b"not a database at all" * 99)
    with pytest.raises(ResourceError, match="cannot be used"):
        ResultCache(tmp_path / "folder")


def test_what_a_key_holds() -> None:
    key = request_key("m", URL, {"prompt": "a", "temperature": 0})
    assert key == request_key("m", URL, {"temperature": 0, "prompt": "a", "user": "me"})
    assert key != request_key("n", URL, {"prompt": "a", "temperature": 0})
    assert key != request_key("m", URL, {"prompt": "a", "temperature": 0, "max_tokens": 1})
    assert deterministic({"seed": 0})
    assert not deterministic({"temperature": 0.1})
    assert not deterministic({"temperature": 0, "previous_response_id": "resp_1"})


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
    command += ["--max-num-seqs", "2"]  # so that it is far from done
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while _records(journal_of(output)) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "which are kept.\nRun the command again to go on." in said
    assert "Traceback" not in said
    assert _records(journal_of(output)) >= 5


def test_files_that_are_in_the_way(demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    arguments = ["batch", str(source), str(output), "--model", str(demo_gguf)]
    assert main(arguments) == 2, "no input"
    source.write_bytes(b"\n")
    assert main(arguments) == 2, "an empty one"
    source.write_bytes(_line("a", prompt="x", model=str(demo_gguf), max_tokens=1))
    output.write_text("precious")
    for refused in (arguments, ["batch", str(source), str(tmp_path), *arguments[3:]]):
        assert main(refused) == 2
    assert main(["batch", str(source), str(source), *arguments[3:], "--overwrite"]) == 2
    journal_of(output).write_text("precious\n")
    assert main([*arguments, "--overwrite"]) == 2
    assert output.read_text() == "precious"
    assert journal_of(output).read_text() == "precious\n"
    journal_of(output).unlink()
    assert "precious" not in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads(output.read_text())["custom_id"] == "a"


def test_what_decides_answers_must_stay(demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(_line("a", prompt="x", model="m", max_tokens=1) + _line("b", prompt="y", model="m", n=2))
    arguments = ["batch", str(source), str(output), "--model", str(demo_gguf), "--served-model-name", "m"]
    assert main([*arguments, "--max-num-seqs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 1, "n=2 cannot run where one sequence does"
    record = json.loads(output.read_text().splitlines()[1])
    assert record["response"]["status_code"] == 400
    output.unlink()

    found = look_at(source)
    identity = _identity(_Asked(str(demo_gguf), ("m",), None, None, None, AUTO, ""))
    with Journal(journal_of(output), {"input": found.sha256, **identity}, 2) as journal:
        journal.add(0, answered("a", 200, {"kept": True}))
    for more, cause in (
        (["--compute", "fp32"], "the way to compute"),
        (["--chat-template", "{{ x }}"], "the chat template"),
    ):
        assert main([*arguments, *more]) == 2
        assert f"{cause} changed" in capsys.readouterr().err
    source.write_bytes(source.read_bytes() + _line("c"))
    assert main(arguments) == 2
    assert "the input changed" in capsys.readouterr().err
    source.write_bytes(source.read_bytes()[: -len(_line("c"))])
    output.write_text("of somebody else")
    assert main(arguments) == 2
    output.unlink()
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["lines"], summary["resumed"], summary["failed"]) == (2, 1, 0)
    assert json.loads(output.read_text().splitlines()[0])["response"]["body"] == {"kept": True}


def test_killed_when_all_was_answered(demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the output took its place, or after that and before the journal was removed: no model is needed."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(_line("a", prompt="x"))
    identity = _identity(_Asked(str(demo_gguf), (str(demo_gguf),), None, None, None, AUTO, ""))
    for there in (False, True):
        assert output.exists() is there
        with Journal(journal_of(output), {"input": look_at(source).sha256, **identity}, 1) as journal:
            journal.add(0, answered("a", 200, {}))
        assert main(["batch", str(source), str(output), "--model", str(demo_gguf), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert (summary["lines"], summary["resumed"], summary["completion_tokens"]) == (1, 1, 0)
        assert not journal_of(output).exists()
    assert json.loads(output.read_text())["custom_id"] == "a"


def test_what_an_artefact_recommends_decides_its_answers_too(demo_gguf: Path, tmp_path: Path) -> None:
    from miaotui.checkpoint import serving

    artefact = tmp_path / "fast.gguf"
    artefact.symlink_to(demo_gguf)

    def way(engine: dict[str, Any]) -> str:
        return _identity(_Asked(str(artefact), ("m",), None, None, None, engine, ""))["way to compute"]

    before = way({})
    assert before == way(AUTO)
    serving.write(artefact, {"kv_cache_dtype": "int8"}, 2)
    assert way({}) != before
    assert way({"kv_cache_dtype": "auto"}) == before, "what is typed counts more"
