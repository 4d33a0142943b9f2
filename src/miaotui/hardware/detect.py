"""What this machine is: instruction sets, cores, caches, memory, NUMA nodes, GPUs. Nothing here imports numpy.

Linux tells it in /proc and /sys; elsewhere the standard library's poorer answers are given. `root` is the folder
that holds `proc` and `sys`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miaotui.hardware import cgroups
from miaotui.hardware.cgroups import ROOT, read_text
from miaotui.hardware.gpus import Gpu, find_gpus
from miaotui.hardware.processors import affinity, memory_nodes, physical_cores

ISA_NAMES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""The extensions that matter to kernels, as Linux spells them; the last five are Arm's."""

_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
KERNELS: dict[str, set[str]] = {
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avxvnni": _AVX2 | {"avx_vnni"},
    "avx2": _AVX2,
    "portable": set(),
}
"""What each kind of kernels needs, best first."""


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes. `cores` are physical cores this process may run on, `threads` its logical processors."""

    cpu: str
    architecture: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    quota: float | None
    """Processors' worth of time the control group allows; None means no limit."""
    caches: dict[str, int]
    """One instance's size by level: `L1d`, `L1i`, `L2`, `L3`."""
    numa_nodes: int
    """Memory nodes beside those processors."""
    memory: int
    """What the machine has, or the control group's limit when that is less."""
    system: str
    gpus: tuple[Gpu, ...]

    @property
    def usable_cores(self) -> int:
        """How many compute threads make sense: one for each physical core, within the quota."""
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))

    @property
    def isa_level(self) -> str:
        """The kernels that run here: the best of `KERNELS` that this processor has, or what MIAOTUI_ISA names."""
        levels = [level for level, needs in KERNELS.items() if needs <= set(self.isa)]
        wanted = os.environ.get("MIAOTUI_ISA")
        return wanted if wanted in levels else levels[0]

    def fingerprint(self) -> str:
        """16 hex digits that stay while speed figures stay comparable: processor, kernels, cores, memory size,
        system."""
        machine = (
            self.cpu,
            self.architecture,
            self.isa,
            self.usable_cores,
            self.caches,
            self.memory >> 30,
            self.system,
        )
        parts = (*machine, self.isa_level)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field, and the derived `usable_cores`, `isa_level` and `fingerprint`."""
        derived = {"usable_cores": self.usable_cores, "isa_level": self.isa_level, "fingerprint": self.fingerprint()}
        return {**asdict(self), **derived}


def detect(root: Path = ROOT) -> Machine:
    """Look at the machine this process runs on."""
    cpus = affinity()
    name, flags = _cpuinfo(root)
    return Machine(
        cpu=name,
        architecture=platform.machine(),
        isa=tuple(isa for isa in ISA_NAMES if isa in flags),
        cores=physical_cores(cpus, root),
        threads=len(cpus),
        quota=cgroups.cpu_quota(root),
        caches=_caches(root),
        numa_nodes=max(1, len(memory_nodes(cpus, root))),
        memory=total_memory(root),
        system=f"{platform.system()} {platform.release()}",
        gpus=tuple(find_gpus()),
    )


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores within affinity and quota: the default number of compute threads. Cheap; asks no GPU."""
    cores, quota = physical_cores(affinity(), root), cgroups.cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def total_memory(root: Path = ROOT) -> int:
    """Bytes of memory, or of the control group's limit when that is less."""
    total = _meminfo(root).get("MemTotal")
    if total is None:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, cgroups.memory_limit(root) or total)


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can be taken now without swapping, within the control group's limit."""
    free = _meminfo(root).get("MemAvailable")
    if free is None:
        names = os.sysconf_names
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else 0
        free = free or total_memory(root) // 2
    left = cgroups.memory_left(root)
    return free if left is None else min(free, left)


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (read_text(root / "proc/meminfo") or "").splitlines()
    matches = (re.match(r"(\w+):\s+(\d+) kB", line) for line in lines)
    return {match[1]: int(match[2]) << 10 for match in matches if match}


def _cpuinfo(root: Path) -> tuple[str, set[str]]:
    """The processor's name and its feature flags."""
    fields: dict[str, str] = {}
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set((fields.get("flags") or fields.get("Features") or "").split())


def _caches(root: Path) -> dict[str, int]:
    """The first processor's caches, one instance of each."""
    sizes = {}
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*")):
        level, kind, size = (read_text(folder / name) or "" for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if match:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            sizes[f"L{level}{suffix}"] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return sizes
