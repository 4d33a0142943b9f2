from __future__ import annotations

import io
import json
import sys

import pytest

from miaotui.cli.main import main
from tests.cli.fakes import FakeLLM, fake_llm

__all__ = ["fake_llm"]


def test_streams_to_stdout_and_figures_to_stderr(fake_llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "m", "one two", "--stats", "--temperature", "0", "--stop", "a", "--stop", "b", "--threads", "3"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == "one two \n"
    assert "3 tokens in, 2 out" in err
    assert fake_llm[0].closed
    assert (fake_llm[0].model, fake_llm[0].options["threads"]) == ("m", 3)
    assert "max_model_len" not in fake_llm[0].options
    prompt, params = fake_llm[0].asked[-1]
    assert (prompt, params.temperature, params.stop, params.max_tokens) == ("one two", 0.0, ["a", "b"], None)


def test_system_and_raw(fake_llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "hi", "--system", "be brief"]) == 0
    assert fake_llm[0].asked[0] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert main(["run", "m", "hi", "--raw"]) == 0
    assert len(fake_llm[1].asked) == 1
    assert main(["run", "m", "hi", "--raw", "--system", "x"]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_model_without_a_chat_template(fake_llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "base", "hi"]) == 1
    assert "--raw" in capsys.readouterr().err
    assert main(["run", "base", "hi", "--raw"]) == 0


def test_json(fake_llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "ein zwei drei", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["text"], report["completion_tokens"], report["finish_reason"]) == ("ein zwei drei ", 3, "stop")
    assert report["tokens_per_second"] > 0
    assert sys.platform != "linux" or report["peak_memory_bytes"] > 1 << 20


def test_prompt_from_a_pipe(
    fake_llm: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped words")))
    assert main(["run", "m"]) == 0
    assert capsys.readouterr().out == "piped words \n"


def test_an_interrupted_answer(fake_llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "interrupt me"]) == 130
    assert capsys.readouterr().out == "interrupt "


def test_a_bad_parameter_is_refused_before_the_model_is_loaded(
    fake_llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "m", "hi", "--top-p", "7"]) == 2
    assert "top_p" in capsys.readouterr().err
    assert fake_llm == []
