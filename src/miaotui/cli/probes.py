"""Where the machine's probes come from: the native kernels, which rooms below may not import."""

from __future__ import annotations

from miaotui.errors import DependencyError
from miaotui.hardware.ceilings import Probes


def native_probes() -> Probes:
    """The probes; DependencyError when the package was installed without its native part."""
    try:
        from miaotui.backends.cpu import _native
    except ImportError as error:
        raise DependencyError(
            f"The native kernels cannot be loaded: {error}.", "Reinstall miaotui, or run `make build` in a checkout."
        ) from error
    return Probes(_native.probe_bandwidth, _native.probe_int8, _native.probe_fp32)
