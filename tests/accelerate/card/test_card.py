"""Cards: the same after a round trip, and refused in words when they are not cards."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from miaotui.accelerate.card import schema as cards
from miaotui.accelerate.card.files import find, read, write
from miaotui.accelerate.card.schema import Card, Floor, Quality, Speed, dominates
from miaotui.errors import CheckpointError
from miaotui.measure.intervals import Estimate
from tests.accelerate.cards import REGIME, TRIALS, make_card, trial

BENCH = {
    "regime": REGIME, "unit": "tokens/s", "median": 50.0, "low": 49.0, "high": 52.0, "p99": 40.0, "ceiling": 100.0,
    "samples": 160, "better": "higher",
}  # fmt: skip


def test_a_card_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    card = make_card()
    path = write(card, tmp_path)
    assert read(path) == read(tmp_path) == Card.parse(card.plain())
    assert read(tmp_path).plain() == card.plain() == json.loads(path.read_text())
    assert read(tmp_path).search.trials == card.search.trials
    assert next(iter(card.plain())) == "schema_version"


def test_beside_a_file_of_weights(tmp_path: Path) -> None:
    weights = tmp_path / "fast.gguf"
    assert write(make_card(), weights) == tmp_path / "fast.card.json"
    weights.touch()
    assert find(weights) == tmp_path / "fast.card.json"
    (tmp_path / "other.gguf").touch()
    write(make_card(), tmp_path)
    with pytest.raises(CheckpointError, match=r"There is no .*other\.card\.json"):
        find(tmp_path / "other.gguf")
    weights.unlink()
    assert find(tmp_path / "other.gguf") == tmp_path / "card.json"


def changed(*path: str | int, **to: Any) -> dict[str, Any]:
    """The card's values with one key of a part set, or gone where it is `...`."""
    values = make_card().plain()
    part: Any = values
    for step in path:
        part = part[step]
    for key, value in to.items():
        if value is ...:
            del part[key]
        else:
            part[key] = value
    return values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "no schema_version"),
        (changed(schema_version=...), "no schema_version"),
        (changed(schema_version=2), "has schema_version 2, and this program reads 1"),
        (changed(schema_version="1"), "has schema_version '1'"),
        (changed(speed=...), "speed is missing"),
        (changed("model", bytes=...), "model.bytes is missing"),
        (changed("search", "trials", 0, state="odd"), "search.trials[0].state is 'odd'"),
        (changed("speed", "before", 1, median="fast"), "speed.before[1].median is 'fast'"),
        (changed("speed", "before", 1, medium=1.0), "no key 'speed.before[1].medium'"),
        (changed(quality=3), "quality. is 3"),
        (changed(versions={"a": 1}), "versions.a is 1"),
        (changed(floor=None), "floor"),
    ],
)
def test_what_is_wrong_is_named(values: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Card.parse(values, "x/card.json")
    assert words.replace("quality. is", "quality is") in caught.value.message
    assert caught.value.message.startswith("x/card.json")


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1, "a": NaN', "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"card\.json cannot be read"):
        read(tmp_path)


def test_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no .*card\.json"):
        read(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "absent.json", tmp_path / "absent.gguf"):
        with pytest.raises(CheckpointError, match="is not there"):
            read(path)


def test_a_figure_that_json_cannot_hold_is_our_mistake(tmp_path: Path) -> None:
    card = make_card(versions={}, calibration={"x": float("nan")})
    with pytest.raises(ValueError):
        write(card, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "cards.md").read_text()
    named = set(re.findall(r"[`\"](\w+)(?:\[\])?[`\"]", page))
    kinds = [kind for kind in vars(cards).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    missing = {f.name for kind in kinds for f in dataclasses.fields(kind)} - named
    assert missing == set()
    assert f"schema_version {cards.SCHEMA_VERSION}" in page


# -- figures ---------------------------------------------------------------------------------------------
def test_speed_of_a_bench_result() -> None:
    speed = Speed.of({**BENCH, "joules_per_token": 1.0})
    assert (speed.median, speed.ceiling, speed.share) == (50.0, 100.0, 0.5)
    load = Speed("load", "s", 0.4, 0.3, 0.5, 5, "lower", 0.1)
    assert load.share == pytest.approx(0.25)
    assert Speed("load", "s", 0.1, 0.1, 0.1, 5, "lower").gain(load) == pytest.approx(4.0)
    assert speed.gain(Speed.of({**BENCH, "median": 25.0})) == 2.0


def test_quality_of_an_evaluation() -> None:
    def figure(name: str, value: float) -> dict[str, Any]:
        return {name: value, f"{name}_stderr": 0.1, f"{name}_interval": [value - 0.2, value + 0.2]}

    def perplexity(value: float) -> dict[str, Any]:
        return {"perplexity": value, "stderr": 0.5, "perplexity_interval": [value - 1, value + 1]}

    report = {
        **perplexity(14.0), **figure("perplexity_ratio", 1.01), **figure("kl_mean", 0.02), **figure("kl_p99", 0.3),
        **figure("top1_flips", 0.03), "p_value": 0.04, "tokens": 2048, "windows": 2, "data": "x.txt",
        "settings": {"window": 1024}, "notes": ["a note"], "reference": {"model": "o", **perplexity(13.9)},
    }  # fmt: skip
    after, before = Quality.of(report), Quality.of_reference(report)
    assert after.perplexity == Estimate(14.0, 0.5, 13.0, 15.0)
    assert after.kl_mean == Estimate(0.02, 0.1, 0.02 - 0.2, 0.02 + 0.2)
    assert (after.p_value, after.notes, after.greedy_agreement) == (0.04, ("a note",), None)
    assert before.perplexity.value == 13.9
    assert before.kl_mean is None
    single = Quality.of({**report, "perplexity_interval": None, "stderr": None})
    assert single.perplexity == Estimate(14.0, None, None, None)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.001, 1.0099, "holds"), (1.001, 1.0101, "undecided"), (1.0101, 1.02, "broken"), (None, None, "undecided")],
)
def test_a_floor_is_decided_by_the_interval(low: float | None, high: float | None, verdict: str) -> None:
    floor = Floor.of(0.01, Estimate(1.005, 0.001, low, high))
    assert floor.verdict == verdict
    assert floor.holds == (verdict == "holds")


def test_the_front() -> None:
    front = [trial.name for trial in make_card().search.front()]
    assert front == [
        "w8-channel rtn",
        "w4g32-sym gptq",
        "w4g64-sym gptq",
        "w4g128-sym awq+gptq",
        "w4g128-sym gptq",
        "w3g64-sym gptq",
    ]
    assert dominates(TRIALS[2], TRIALS[3])
    assert not dominates(TRIALS[3], TRIALS[2])
    same = trial("twin", "measured", 262.0, 0.0068, "")
    assert not dominates(same, TRIALS[2])
    assert not dominates(TRIALS[2], same)
