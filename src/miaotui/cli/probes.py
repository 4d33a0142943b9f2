"""Where the machine's probes come from: the native kernels, which rooms below may not import."""

from __future__ import annotations

from miaotui.errors import DependencyError
from miaotui.hardware.ceilings import Probes
from miaotui.hardware.processors import seats


def native_probes() -> Probes:
    """The probes; DependencyError when the package was installed without its native part."""
    try:
        import miaotui.backends.cpu._native as native
    except ImportError as error:
        raise DependencyError(
            f"The native kernels cannot be loaded: {error}.", "Reinstall miaotui, or run `make build` in a checkout."
        ) from error

    def bandwidth(threads: int, megabytes: int, seconds: float) -> list[float]:
        rates: list[float] = native.probe_bandwidth(threads, megabytes, seconds, seats(threads))
        return rates

    return Probes(bandwidth, native.probe_int8, native.probe_fp32)
