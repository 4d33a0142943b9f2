"""The journal: what was finished is told again, whatever the end of the file looks like."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from miaotui.accelerate.search.journal import Entry, Journal
from miaotui.errors import UsageError

SEARCH = {"model": "1a2b", "goal": "latency"}
ENTRIES = {
    "build 1": Entry(1.5, {"bytes": 10, "notes": []}),
    "score 1 0-8": Entry(0.25, {"nll": [0.5, -1e-9, 1 / 3]}),
    "build 2": Entry(0.1, None, ("There is no room.", "Make some.")),
}


def filled(path: Path) -> Path:
    with Journal(path, SEARCH) as journal:
        for action, entry in ENTRIES.items():
            journal.add(action, entry)
    return path


def read(path: Path, search: dict[str, Any] = SEARCH, *, restart: bool = False) -> dict[str, Entry]:
    with Journal(path, search, restart=restart) as journal:
        return journal.entries


def test_what_was_finished_is_told_again(tmp_path: Path) -> None:
    assert read(filled(tmp_path / "deep" / "journal")) == ENTRIES


def test_every_torn_end_leaves_what_was_whole_before(tmp_path: Path) -> None:
    data = filled(tmp_path / "journal").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data)):
        torn = tmp_path / "torn"
        torn.write_bytes(data[:cut])
        whole = max(0, sum(end <= cut for end in ends) - 1)
        assert read(torn) == dict(list(ENTRIES.items())[:whole]), cut
        with Journal(torn, SEARCH) as journal:  # and it can be written on
            journal.add("more", Entry(1.0, {}))
        assert list(read(torn)) == [*list(ENTRIES)[:whole], "more"]


def test_a_damaged_line_ends_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal")
    data = bytearray(path.read_bytes())
    second = data.index(b"score")
    data[second] ^= 1
    path.write_bytes(data)
    assert list(read(path)) == ["build 1"]


def test_noise_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(random.Random(0).randbytes(100) + b"\n")
    with pytest.raises(UsageError, match="no journal"):
        read(path)


def test_anothers_file_without_an_end_of_line_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"notes of mine")
    with pytest.raises(UsageError, match="no journal"):
        read(path)
    assert path.read_bytes() == b"notes of mine"


def test_another_search_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal")
    with pytest.raises(UsageError, match=r"the goal changed.*--restart"):
        read(path, {**SEARCH, "goal": "memory"})
    assert read(path) == ENTRIES
    assert read(path, {**SEARCH, "goal": "memory"}, restart=True) == {}


def test_one_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", SEARCH), pytest.raises(UsageError, match="Another process"):
        Journal(tmp_path / "journal", SEARCH)
    assert read(tmp_path / "journal") == {}
