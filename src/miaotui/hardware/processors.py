"""The processors this process may use: physical cores, and the memory nodes (NUMA) that they are beside.

`root` is the folder that holds `sys`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from miaotui.hardware.cgroups import ROOT, read_int, read_text

Seat = tuple[int, list[int]]
"""A memory node, and the processors beside it."""


def affinity() -> list[int]:
    """The logical processors that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores(cpus: Sequence[int], root: Path = ROOT) -> int:
    """Distinct (package, core) pairs among `cpus`; hyper-threads of one core count once."""
    topology = [root / f"sys/devices/system/cpu/cpu{cpu}/topology" for cpu in cpus]
    pairs = {(read_int(folder / "physical_package_id"), read_int(folder / "core_id")) for folder in topology}
    return len(cpus) if any(core is None for _, core in pairs) else len(pairs)


def memory_nodes(cpus: Sequence[int], root: Path = ROOT) -> dict[int, list[int]]:
    """Those of `cpus` that are beside each memory node, by the node's number; nodes without any are left out."""
    found = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        beside = sorted(set(cpus) & set(_listed(read_text(folder / "cpulist") or "")))
        if beside:
            found[int(folder.name.removeprefix("node"))] = beside
    return dict(sorted(found.items()))


def seats(threads: int, cpus: Sequence[int] | None = None, root: Path = ROOT) -> list[Seat]:
    """A seat for each thread; none where there is one memory node, and so nothing to choose.

    Neighbours, who read neighbouring parts of every weight, share a node. Nodes have threads in proportion to their
    physical cores, so that few threads read from all of the memory's channels too.
    """
    nodes = memory_nodes(affinity() if cpus is None else cpus, root)
    if len(nodes) < 2:
        return []
    cores = [node for node, beside in nodes.items() for _ in range(physical_cores(beside, root))]
    return [(node, nodes[node]) for node in (cores[thread * len(cores) // threads] for thread in range(threads))]


def _listed(text: str) -> list[int]:
    """The numbers of a kernel's list such as `0-3,8,10-11`."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [number for first, last in spans for number in range(int(first), int(last or first) + 1)]
