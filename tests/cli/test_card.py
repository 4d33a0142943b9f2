"""`miaotui card`: for people, as JSON, as a page; and a card that is strange does no harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miaotui.accelerate.card import readme, report, terminal
from miaotui.accelerate.card.publish import publish
from miaotui.accelerate.card.schema import Card
from miaotui.cli.main import main
from miaotui.errors import CheckpointError
from tests.accelerate.cards import make_card


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    publish(make_card(), tmp_path)
    return tmp_path


def test_for_people(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(artefact)]) == 0
    said = capsys.readouterr().out
    for text in (make_card().verdict, "4.28×", "+0.43%", "no power sensor", "The fastest that holds", "33.0 GB/s"):
        assert text in said, text
    assert said.index("! The original's weights") < said.index("decode-1@512  ")
    assert max(map(len, said.splitlines())) <= 120


def test_as_json(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(artefact / "card.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == make_card().plain()


def test_as_a_page(artefact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "a page.html"
    assert main(["card", str(artefact), "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(page) in captured.err
    assert page.read_text() == report.render(make_card())


def test_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(tmp_path)]) == 1
    assert "There is no" in capsys.readouterr().err
    assert main(["card", str(tmp_path / "absent")]) == 1
    assert "is not there" in capsys.readouterr().err


def test_a_card_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(make_card(verdict="\x1b]0;title\x07\x1b[2J[red]plain[/red]\u202e", versions={"a\x1b[1m": "b"}), tmp_path)
    assert main(["card", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "[red]plain[/red]" in said
    assert not set("\x1b\x07\u202e") & set(said)


def changed(part: Any, odd: Any) -> Any:
    """The same with every number in it replaced."""
    if isinstance(part, dict):
        return {key: changed(item, odd) for key, item in part.items()}
    if isinstance(part, list):
        return [changed(item, odd) for item in part]
    return odd if isinstance(part, (int, float)) and not isinstance(part, bool) else part


def variants(odd: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cards in which one part after another has odd numbers."""
    for key, part in make_card().plain().items():
        if key == "schema_version":
            continue
        yield key, {**make_card().plain(), key: changed(part, odd)}
        for name, inner in part.items() if isinstance(part, dict) else ():
            yield f"{key}.{name}", {**make_card().plain(), key: {**part, name: changed(inner, odd)}}


@pytest.mark.parametrize("odd", [0, -1, 10**15, 10**400, float("inf"), "nan", None])
def test_odd_numbers_are_shown_or_refused(odd: Any) -> None:
    """Nothing in between: no traceback, whatever a card says."""
    shown = set()
    for where, values in variants(odd):
        if values == make_card().plain():
            continue
        try:
            card = Card.parse(values)
        except CheckpointError:
            continue
        for render in (report.render, readme.render, terminal.shown):
            try:
                render(card)  # type: ignore[operator]
            except Exception as error:
                raise AssertionError(f"{where}: {render.__module__}: {error!r}") from error
        shown.add(where)
    expected = {0: 30, -1: 30, 10**15: 30}.get(odd, 0) if odd is not None else 5
    assert len(shown) >= expected, shown
