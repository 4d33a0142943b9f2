from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from miaotui.measure.report import number, share, table


def result(name: str, median: float, ceiling: float | None, better: str) -> dict[str, Any]:
    interval = {"median": median, "low": median * 0.9, "high": median * 1.1, "p99": median * 0.8}
    return {"regime": name, "unit": "tokens/s", **interval, "ceiling": ceiling, "samples": 5, "better": better}


def make_report(others: float) -> dict[str, Any]:
    limits = {"threads": 2, "working_set": 98_000_000, "bandwidth": 20e9, "int8": 1.5e12, "fp32": 0.2e12}
    return {
        "machine": {"cpu": "A CPU", "isa_level": "avx2", "ceilings": limits, "disturbance": {"others": others}},
        "model": {"name": "demo", "family": "llama", "weight_bytes": 98_000_000, "integer": True},
        "results": [
            result("decode-1@16", 120.0, 200.0, "higher"),
            result("load", 0.2, 0.05, "lower"),
            result("start", 0.5, None, "lower"),
        ],
    }


def text_of(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table() -> None:
    text = text_of(make_report(others=0.0))
    decode, load, start = text.splitlines()[-3:]
    assert decode.split() == ["decode-1@16", "tokens/s", "120", "108", "–", "132", "96", "200", "60%"]
    assert load.split()[-1] == "25%"
    assert "%" not in start
    assert "20.0 GB/s over 98 MB" in text
    assert "int8 1.50 TOPS" in text
    assert "disturbed" not in text


def test_a_disturbed_measurement_says_so() -> None:
    assert "other processes used 1.3 cores" in text_of(make_report(others=1.3))


def test_heat_throttling_and_energy_are_told() -> None:
    report = make_report(others=0.0)
    report["machine"]["disturbance"] |= {"throttled": 3, "celsius": 98.0}
    report["energy"] = {"joules_per_token": None, "unavailable": "no counter"}
    text = text_of(report)
    assert "slowed itself down 3 times" in text
    assert "98 °C" in text
    assert "energy: unavailable (no counter)" in text


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (99.44, "99.4"), (0.12345, "0.123"), (3.0, "3")])
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_share_without_ceiling() -> None:
    assert share(result("start", 1.0, None, "lower")) == ""
