"""What disturbs a measurement: other processes on the cores, heat, throttling."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from miaotui.hardware.cgroups import ROOT, read_int, read_text
from miaotui.hardware.processors import affinity

BUSY = 0.15
"""Cores' worth of other work from which a measurement is called disturbed."""


@dataclass(frozen=True)
class Disturbance:
    """`others` is the cores' worth of time that other processes took; `celsius` the hottest sensor, if any."""

    others: float
    load_average: float
    celsius: float | None
    throttled: int

    @property
    def sentence(self) -> str | None:
        """What is wrong, for people; None when nothing is."""
        if self.others >= BUSY:
            return f"other processes use {self.others:.1f} cores: figures will be low and noisy"
        if self.throttled:
            return f"the processor slowed itself down {self.throttled} times because of heat or power"
        return None


class Watch:
    """Counts from its creation to `read()`: wrap a measurement in it, or sleep in between."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._start = _counters(root)
        self._throttles = throttles(root)

    def read(self) -> Disturbance:
        """What happened since the start. Below a fifth of a second the counters are too coarse to mean anything."""
        seconds, busy, own = (now - then for now, then in zip(_counters(self._root), self._start, strict=True))
        others = max(0.0, busy - own) / seconds if seconds >= 0.2 else 0.0
        return Disturbance(others, os.getloadavg()[0], hottest(self._root), throttles(self._root) - self._throttles)


def glance(seconds: float = 0.3) -> Disturbance:
    """Do nothing for a moment and see who else works."""
    watch = Watch()
    time.sleep(seconds)
    return watch.read()


def hottest(root: Path = ROOT) -> float | None:
    """The hottest thermal zone or processor sensor in °C; None where the machine shows none (most virtual machines)."""
    paths = list((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    for chip in (root / "sys/class/hwmon").glob("hwmon*"):
        if read_text(chip / "name") in ("coretemp", "k10temp", "zenpower"):
            paths += chip.glob("temp*_input")
    readings = [read_int(path) for path in paths]
    return max((reading / 1000 for reading in readings if reading is not None), default=None)


def throttles(root: Path = ROOT) -> int:
    """Throttling events that the processors have counted since the machine started."""
    counts = [
        read_int(root / f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count") for cpu in affinity()
    ]
    return sum(count or 0 for count in counts)


def _counters(root: Path) -> tuple[float, float, float]:
    """Seconds: wall clock, busy time summed over our processors, this process's and its finished children's."""
    cpus = {f"cpu{cpu}" for cpu in affinity()}
    ticks = 0
    for line in (read_text(root / "proc/stat") or "").splitlines():
        words = line.split()
        if words and words[0] in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, *rest = (int(word) for word in words[1:])
            ticks += user + nice + system + irq + softirq + (rest[0] if rest else 0)  # rest[0]: stolen by the host
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), own
