"""Cores, memory nodes and seats, over machines laid out in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from miaotui.hardware import detect
from miaotui.hardware.processors import affinity, memory_nodes, seats


def two_sockets(root: Path) -> Path:
    """Two packages of three cores with two threads each, numbered as Linux does; a third node has memory alone."""
    for cpu in range(12):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu % 6 // 3}\n")
        (folder / "core_id").write_text(f"{cpu % 3}\n")
    for node, cpus in enumerate(("0-2,6-8", "3-5,9-11", "")):
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    return root


def test_nodes_are_those_beside_the_processors(tmp_path: Path) -> None:
    root = two_sockets(tmp_path)
    assert memory_nodes(range(12), root) == {0: [0, 1, 2, 6, 7, 8], 1: [3, 4, 5, 9, 10, 11]}
    assert memory_nodes([2, 3, 9], root) == {0: [2], 1: [3, 9]}
    assert memory_nodes([0, 1], root) == {0: [0, 1]}
    assert memory_nodes(range(4), tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(
    ("threads", "cpus", "nodes"),
    [
        (6, range(12), [0, 0, 0, 1, 1, 1]),
        (2, range(12), [0, 1]),
        (3, range(12), [0, 0, 1]),
        (1, range(12), [0]),
        (12, range(12), [0] * 6 + [1] * 6),
        (4, [0, 6, 3, 4, 5], [0, 1, 1, 1]),
        (4, [0, 1, 2, 6, 7, 8], []),
    ],
)
def test_neighbours_share_a_node(tmp_path: Path, threads: int, cpus: range | list[int], nodes: list[int]) -> None:
    """By physical cores: one with two threads counts once."""
    root = two_sockets(tmp_path)
    found = seats(threads, cpus, root)
    assert [node for node, _ in found] == nodes
    beside = memory_nodes(cpus, root)
    assert all(given == beside[node] for node, given in found)


def test_this_machine_makes_sense() -> None:
    nodes = memory_nodes(affinity())
    assert len(seats(4)) == (4 if len(nodes) > 1 else 0)
    assert detect.detect().numa_nodes == max(1, len(nodes))
