"""Counters of energy, over machines laid out in a folder and over a driver's library that is made up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from miaotui.hardware import gpus, power, sensors


def lay(root: Path, files: dict[str, object]) -> Path:
    """Put files below `sys`, each changing at once, as the kernel's do."""
    for name, text in files.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f".{path.name}")
        written.write_text(f"{text}\n")
        written.replace(path)
    return root


def zone(path: str, name: str, microjoules: int, most: int = 262_143_328_850) -> dict[str, object]:
    folder = f"class/powercap/{path}"
    return {f"{folder}/name": name, f"{folder}/energy_uj": microjoules, f"{folder}/max_energy_range_uj": most}


SERVER = {
    **zone("intel-rapl:0", "package-0", 5_000_000), **zone("intel-rapl:1", "package-1", 7_000_000),
    **zone("intel-rapl:0:0", "dram", 2_000_000), **zone("intel-rapl:0:1", "core", 4_000_000),
    **zone("intel-rapl:2", "psys", 90_000_000), **zone("intel-rapl-mmio:0", "package-0", 5_000_000),
}  # fmt: skip


def test_packages_and_their_memory_once_each(tmp_path: Path) -> None:
    found = power.processor(lay(tmp_path, SERVER))
    assert {c.name: c.read() for c in found.counters} == {
        "package-0 (RAPL)": 5.0, "dram 0 (RAPL)": 2.0, "package-1 (RAPL)": 7.0,
    }  # fmt: skip
    assert found.counters[0].range == pytest.approx(262_143.32885)
    assert found.why is None


def test_the_whole_platform_where_nothing_smaller_is_counted(tmp_path: Path) -> None:
    found = power.processor(lay(tmp_path, zone("intel-rapl:0", "psys", 90_000_000)))
    assert [c.name for c in found.counters] == ["psys (RAPL)"]


def test_sockets_of_amd_energy_unless_rapl_shows_them(tmp_path: Path) -> None:
    chip = "class/hwmon/hwmon3"
    files = {f"{chip}/name": "amd_energy", f"{chip}/energy1_label": "Ecore000", f"{chip}/energy1_input": 1_000_000}
    files |= {f"{chip}/energy2_label": "Esocket0", f"{chip}/energy2_input": 9_000_000}
    found = power.processor(lay(tmp_path, files))
    assert {c.name: c.read() for c in found.counters} == {"Esocket0 (amd_energy)": 9.0}
    names = power.processor(lay(tmp_path, SERVER)).names
    assert not any("Esocket" in name for name in names)


def test_a_meter_of_the_machine_only_where_nothing_else_counts(tmp_path: Path) -> None:
    chip = "class/hwmon/hwmon0"
    lay(tmp_path, {f"{chip}/name": "power_meter", f"{chip}/power1_average": 250_000_000})
    found = power.processor(tmp_path)
    assert [meter.read() for meter in found.meters] == [250.0]
    assert found.why is None
    assert power.processor(lay(tmp_path, SERVER)).meters == ()


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, zone("intel-rapl:0", "package-0", 1))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert power.processor(tmp_path).why == "/sys/class/powercap/intel-rapl:0/energy_uj may be read by root only"


def test_a_machine_that_shows_nothing_says_so(tmp_path: Path) -> None:
    assert "no energy counter" in (power.processor(tmp_path).why or "")


def test_processor_sensors_count_as_heat(tmp_path: Path) -> None:
    chip = "class/hwmon/hwmon1"
    lay(tmp_path, {f"{chip}/name": "coretemp", f"{chip}/temp1_input": 71_000, f"{chip}/temp2_input": 83_500})
    lay(tmp_path, {"class/hwmon/hwmon2/name": "nvme", "class/hwmon/hwmon2/temp1_input": 99_000})
    assert sensors.hottest(tmp_path) == 83.5


class Driver:
    """NVML with one device; `reasons` slow it down."""

    def __init__(self, millijoules: int | None = 123_456, reasons: int = 0) -> None:
        self.millijoules, self.reasons = millijoules, reasons

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, length: Any) -> int:
        buffer.value = b"A GPU"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, answer: Any) -> int:
        if self.millijoules is None:
            return 3  # NVML_ERROR_NOT_SUPPORTED
        answer._obj.value = self.millijoules
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, answer: Any) -> int:
        assert sensor.value == 0
        answer._obj.value = 64
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, answer: Any) -> int:
        answer._obj.value = self.reasons
        return 0


def test_a_gpu_counts_its_own() -> None:
    driver = Driver()
    (gpu,) = gpus.live_gpus(lambda name: driver)
    assert (gpu.energy.name, gpu.energy.read(), gpu.celsius(), gpu.slowed()) == ("A GPU 0 (NVML)", 123.456, 64, None)
    driver.reasons = 0x1 | 0x40
    assert gpu.slowed() == "heat"
    driver.reasons = 0x2  # clocks that somebody has set
    assert gpu.slowed() is None


def test_a_gpu_that_does_not_count_is_left_out() -> None:
    def no_driver(name: str) -> Any:
        raise OSError(name)

    assert gpus.live_gpus(lambda name: Driver(None)) == []
    assert gpus.live_gpus(no_driver) == []
