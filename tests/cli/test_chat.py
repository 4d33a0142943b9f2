from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from miaotui.cli.main import main
from tests.cli.fakes import FakeLLM, fake_llm

__all__ = ["fake_llm"]


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str, flags: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", "m", *flags])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversations(llm: FakeLLM) -> list[list[dict[str, str]]]:
    return [asked for asked in llm.asked if isinstance(asked, list)]


def test_turns_are_remembered_until_reset(
    fake_llm: list[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "one", "two", "/reset", "three", "/exit", "four") == 0
    assert capsys.readouterr().out == "one \ntwo \nthree \n"
    assert conversations(fake_llm[0]) == [
        [user("one")],
        [user("one"), assistant("one "), user("two")],
        [user("three")],
    ]


def test_system_prompt(
    fake_llm: list[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "/system", "a", "/system be brief", "/system", "b", flags=("--system", "shout")) == 0
    first, second = conversations(fake_llm[0])
    assert first == [{"role": "system", "content": "shout"}, user("a")]
    assert second == [{"role": "system", "content": "be brief"}, user("b")]
    assert capsys.readouterr().err == "shout\nbe brief\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(
    fake_llm: list[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "interrupt me", "go on") == 0
    out, err = capsys.readouterr()
    assert out == "interrupt \ngo on \n"
    assert "[stopped]" in err
    assert conversations(fake_llm[0])[1] == [user("interrupt me"), assistant("interrupt "), user("go on")]


def test_errors_are_said_and_the_question_is_forgotten(
    fake_llm: list[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "too long", "/nonsense", "/save", "/save /nowhere/at/all.json", "ok") == 0
    out, err = capsys.readouterr()
    assert out == "ok \n"
    assert err.count("error: ") == 4
    assert "Shorten it." in err
    assert conversations(fake_llm[0])[-1] == [user("ok")]


def test_save(fake_llm: list[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    assert talk(monkeypatch, "你好", f"/save {path}", "/help") == 0
    assert json.loads(path.read_text()) == {"model": "m", "messages": [user("你好"), assistant("你好 ")]}
