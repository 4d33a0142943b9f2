"""The native backend: kernels over packed weights, replayed as one recorded program a step. Needs no PyTorch."""

from miaotui.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
