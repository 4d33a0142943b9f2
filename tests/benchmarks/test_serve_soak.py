"""The soak, for a moment: our server under clients that misbehave."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import serve_soak


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs start themselves again by their names as modules."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, (root, *sys.path[:1]))))
    monkeypatch.chdir(root)


@pytest.mark.usefixtures("checkout")
def test_a_short_soak(demo_gguf: Path) -> None:
    report = serve_soak.soak(argparse.Namespace(model=str(demo_gguf), clients=8, minutes=0.06, seed=1))
    assert report["wrong"] == []
    for check in ("answered", "no_leak", "exit", "quiet"):
        assert report["checks"][check], report["log"]
    assert sum(report["deeds"].values()) > 8
    assert report["tokens_read"] > 0
    assert report["health_ms"]["asked"] > 5


def test_what_is_wrong_is_seen() -> None:
    options = argparse.Namespace(clients=1, minutes=1.0)
    clients = serve_soak.Clients(None, seed=0)  # type: ignore[arg-type]
    sound = {"integrity": "sound", "running": 0, "waiting": 0, "blocks_in_use": 0}
    quick, flat = [0.001] * 200, [100] * 100

    def failed(latencies: list[float], memory: list[int], rest: dict[str, object], status: int, log: str) -> list[str]:
        report = serve_soak._report(options, clients, latencies, memory, rest, status, [log])
        return [name for name, well in report["checks"].items() if not well]

    assert failed(quick, flat, sound, 0, "") == []
    assert failed([*quick, *[0.06] * 5], flat, sound, 0, "") == ["health"]
    assert failed(quick, [100] * 30 + [106] * 70, sound, 0, "") == ["memory_flat"]
    assert failed(quick, flat, sound | {"blocks_in_use": 1}, 0, "") == ["no_leak"]
    assert failed(quick, flat, sound | {"integrity": "a block is lost"}, 0, "") == ["no_leak"]
    assert failed(quick, flat, sound, 1, "Traceback (most recent call last):") == ["exit", "quiet"]
    clients.wrong.append("stream: cut")
    assert failed(quick, flat, sound, 0, "") == ["answered"]
