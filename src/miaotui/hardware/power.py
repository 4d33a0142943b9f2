"""Counters of energy: joules that a part of the machine has used since a moment that nobody knows.

| where | what is counted |
|---|---|
| `/sys/class/powercap` | RAPL: each processor package, and memory where it is counted apart (Intel SDM 3B, §16.10) |
| `/sys/class/hwmon` | `amd_energy`: each socket; `power_meter`: the whole machine's watts, when nothing else is there |
| NVML | each NVIDIA device's total energy (nvmlDeviceGetTotalEnergyConsumption) |

Parts that contain one another are not counted twice. Every function takes `root`, which holds `sys`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from miaotui.hardware.cgroups import ROOT, read_int, read_text


@dataclass(frozen=True)
class Counter:
    """`read` gives joules; they begin anew after `range` of them, where that is known."""

    name: str
    read: Callable[[], float | None]
    range: float | None = None


@dataclass(frozen=True)
class PowerMeter:
    """`read` gives the watts of this moment, or of the last second."""

    name: str
    read: Callable[[], float | None]


@dataclass(frozen=True)
class Sources:
    """What counts here. `refused` are files that are there and may not be read; `why` says what is lacking."""

    counters: tuple[Counter, ...] = ()
    meters: tuple[PowerMeter, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*(counter.name for counter in self.counters), *(meter.name for meter in self.meters))

    @property
    def why(self) -> str | None:
        """Why nothing can be counted; None when something can."""
        if self.names:
            return None
        if self.refused:
            return f"{self.refused[0]} may be read by root only"
        return "this machine shows no energy counter: neither powercap nor hwmon has one"


def processor(root: Path = ROOT) -> Sources:
    """What the processors and their memory use, or, where only that is known, the whole machine."""
    zones = [*_zones(root), *_sockets(root)]
    counters = tuple(_counter(name, path, limit) for name, path, limit in zones if os.access(path, os.R_OK))
    refused = tuple(f"/{path.relative_to(root)}" for _, path, _ in zones if not os.access(path, os.R_OK))
    meters = () if counters else tuple(_meters(root))
    return Sources(counters, meters, refused)


Zone = tuple[str, Path, float | None]
"""A counter's name, its file of microjoules, and the joules after which it begins anew."""


def _zones(root: Path) -> Iterator[Zone]:
    """RAPL's packages and, in or beside them, their memory; the whole platform (`psys`) only where there is neither.

    `intel-rapl-mmio` shows the same packages once more; `core` and `uncore` lie within a package.
    """
    folder = root / "sys/class/powercap"
    zones = sorted(path for path in folder.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl(:\d+){1,2}", path.name))
    named = [(read_text(path / "name") or "", path) for path in zones if (path / "energy_uj").exists()]
    parts = [(name, path) for name, path in named if name.startswith("package") or name == "dram"]
    for name, path in parts or [(name, path) for name, path in named if name == "psys"]:
        limit = read_int(path / "max_energy_range_uj")
        socket = f" {path.name.split(':')[1]}" if name == "dram" else ""
        yield f"{name}{socket} (RAPL)", path / "energy_uj", None if limit is None else limit / 1e6


def _sockets(root: Path) -> Iterator[Zone]:
    """The sockets of amd_energy, which newer kernels show as RAPL instead."""
    if any((root / "sys/class/powercap").glob("intel-rapl:*")):
        return
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if read_text(chip / "name") != "amd_energy":
            continue
        for label in sorted(chip.glob("energy*_label")):
            name = read_text(label) or ""
            if name.startswith("Esocket"):
                yield f"{name} (amd_energy)", chip / label.name.replace("_label", "_input"), None


def _counter(name: str, path: Path, limit: float | None) -> Counter:
    return Counter(name, partial(_millionths, path), limit)


def _meters(root: Path) -> Iterator[PowerMeter]:
    """Meters at the machine's supply (ACPI), which give watts."""
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        path = next((chip / n for n in ("power1_average", "power1_input") if (chip / n).is_file()), None)
        if read_text(chip / "name") in ("power_meter", "acpi_power_meter") and path is not None:
            yield PowerMeter("the whole machine (ACPI power meter)", partial(_millionths, path))


def _millionths(path: Path) -> float | None:
    value = read_int(path)
    return None if value is None else value / 1e6
