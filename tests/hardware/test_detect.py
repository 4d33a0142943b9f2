"""Detection over machines laid out in a folder, and sanity on the one that runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from miaotui.hardware import cgroups, detect
from miaotui.hardware.detect import Machine

GIB = 1 << 30
MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1000000 kB\nMemAvailable:   16777216 kB\n"


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_this_machine_makes_sense() -> None:
    machine = detect.detect()
    assert 1 <= machine.usable_cores <= machine.cores <= machine.threads <= (os.cpu_count() or 1)
    assert machine.usable_cores == detect.usable_cores()
    assert 0 < detect.available_memory() <= machine.memory
    assert machine.fingerprint() == detect.detect().fingerprint()
    assert machine.as_dict()["isa_level"] in set(detect.KERNELS)


def test_cgroup_v2_limits_of_group_and_ancestor(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner",
            "proc/meminfo": MEMINFO,
            "sys/fs/cgroup/outer/cpu.max": "150000 100000",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000",
            "sys/fs/cgroup/outer/memory.max": str(8 * GIB),
            "sys/fs/cgroup/outer/memory.current": str(7 * GIB),
            "sys/fs/cgroup/outer/memory.stat": f"anon 1\ninactive_file {3 * GIB}",
            "sys/fs/cgroup/outer/inner/memory.max": "max",
            "sys/fs/cgroup/outer/inner/memory.current": "1",
        },
    )
    assert cgroups.cpu_quota(root) == 1.5
    assert detect.total_memory(root) == 8 * GIB
    assert detect.available_memory(root) == 4 * GIB


def test_cgroup_v1_in_a_container_whose_path_is_not_mounted(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc",
            "proc/meminfo": MEMINFO,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}",
        },
    )
    assert cgroups.cpu_quota(root) == 2.0
    assert detect.available_memory(root) == 2 * GIB


def test_without_limits_memory_is_the_machines(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/",
            "proc/meminfo": MEMINFO,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
        },
    )
    assert cgroups.cpu_quota(root) is None
    assert (detect.total_memory(root), detect.available_memory(root)) == (32 * GIB, 16 * GIB)


def test_hyper_threads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "affinity", lambda: [0, 1, 2, 3])
    topology = "sys/devices/system/cpu/cpu{}/topology/{}"
    cores = {topology.format(cpu, "core_id"): str(cpu // 2) for cpu in range(4)}
    packages = {topology.format(cpu, "physical_package_id"): "0" for cpu in range(4)}
    cache = {
        f"sys/devices/system/cpu/cpu0/cache/index{index}/{key}": value
        for index, entry in enumerate([("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "32M")])
        for key, value in zip(("level", "type", "size"), entry, strict=True)
    }
    machine = detect.detect(lay(tmp_path, {**cores, **packages, **cache, "proc/meminfo": MEMINFO}))
    assert (machine.cores, machine.threads) == (2, 4)
    assert machine.caches == {"L1d": 32 << 10, "L1i": 64 << 10, "L3": 32 << 20}


@pytest.mark.parametrize(
    ("isa", "level"),
    [
        ("", "portable"),
        ("avx2 fma", "portable"),
        ("avx2 fma f16c", "avx2"),
        ("avx2 fma f16c avx_vnni", "avxvnni"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx_vnni", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16", "avx512bf16"),
    ],
)
def test_isa_level(isa: str, level: str) -> None:
    machine = Machine("cpu", "x86_64", tuple(isa.split()), 4, 8, 2.5, {}, 1, GIB, "Linux", ())
    assert machine.isa_level == level
    assert machine.usable_cores == 2


def test_kernels_that_are_named_are_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("cpu", "x86_64", ("avx2", "fma", "f16c"), 4, 8, None, {}, 1, GIB, "Linux", ())
    found = machine.fingerprint()
    monkeypatch.setenv("MIAOTUI_ISA", "avx512")
    assert (machine.isa_level, machine.fingerprint()) == ("avx2", found)
    monkeypatch.setenv("MIAOTUI_ISA", "portable")
    assert machine.isa_level == "portable"
    assert machine.fingerprint() != found
