"""NVIDIA devices, asked from the driver's own library (NVML) by ctypes: no PyTorch, no child process."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any


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


def find_gpus() -> list[Gpu]:
    """The devices; empty when there is no driver, no device, or the driver refuses to answer."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
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
