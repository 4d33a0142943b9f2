"""NVIDIA devices, asked from the driver's own library (NVML) by ctypes: no PyTorch, no child process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miaotui.hardware.power import Counter


@dataclass(frozen=True)
class Gpu:
    """One device as the driver reports it; memory in bytes, `capability` as (major, minor)."""

    name: str
    memory: int
    memory_free: int
    driver: str
    capability: tuple[int, int]


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


LIBRARY = "libnvidia-ml.so.1"
_SLOWED = {
    0x04: "its power limit",
    0x20: "heat",
    0x40: "heat",
    0x80: "the power supply",
}
"""Why a device runs slower than it could (nvml.h, nvmlClocksEventReason…), as far as it is no setting of somebody's."""


@dataclass(frozen=True)
class Live:
    """What can be asked of a device while it works; None where it does not say."""

    name: str
    energy: Counter
    celsius: Callable[[], float | None]
    slowed: Callable[[], str | None]
    """What slows it down right now, such as `heat`."""


def live_gpus(load: Callable[[str], Any] = ctypes.CDLL) -> list[Live]:
    """The devices that count their energy (Volta and newer). The driver's library stays open for the process's life."""
    try:
        library = load(LIBRARY)
    except OSError:
        return []
    count = ctypes.c_uint()
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    devices = (_live(library, index) for index in range(count.value))
    return [device for device in devices if device is not None and device.energy.read() is not None]


def _live(library: Any, index: int) -> Live | None:
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
        return None

    def ask(function: Any, kind: Callable[[], Any], *arguments: Any) -> int | None:
        answer = kind()
        return answer.value if function(handle, *arguments, ctypes.byref(answer)) == 0 else None

    def energy() -> float | None:
        millijoules = ask(library.nvmlDeviceGetTotalEnergyConsumption, ctypes.c_ulonglong)
        return None if millijoules is None else millijoules / 1000

    def celsius() -> float | None:
        return ask(library.nvmlDeviceGetTemperature, ctypes.c_uint, ctypes.c_int(0))

    def slowed() -> str | None:
        reasons = ask(library.nvmlDeviceGetCurrentClocksThrottleReasons, ctypes.c_ulonglong) or 0
        return next((why for bit, why in sorted(_SLOWED.items(), reverse=True) if reasons & bit), None)

    name = f"{_string(library.nvmlDeviceGetName, handle)} {index}"
    return Live(name, Counter(f"{name} (NVML)", energy), celsius, slowed)


def find_gpus() -> list[Gpu]:
    """The devices; empty when there is no driver, no device, or the driver refuses to answer."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return []
    if library.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        driver = _string(library.nvmlSystemGetDriverVersion)
        devices = (_device(library, index, driver) for index in range(count.value))
        return [device for device in devices if device is not None]
    finally:
        library.nvmlShutdown()


def _device(library: Any, index: int, driver: str) -> Gpu | None:
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
        return None
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    name = _string(library.nvmlDeviceGetName, handle)
    return Gpu(name, memory.total, memory.free, driver, (major.value, minor.value))


def _string(function: Any, *arguments: Any) -> str:
    """Call an NVML function that fills a text buffer."""
    buffer = ctypes.create_string_buffer(96)
    status = function(*arguments, buffer, ctypes.c_uint(len(buffer)))
    return buffer.value.decode(errors="replace") if status == 0 else "unknown"
