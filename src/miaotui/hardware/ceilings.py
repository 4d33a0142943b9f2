"""The machine's measured limits: how fast memory is read and how many operations a second all cores do.

The probes themselves are native code, which this room may not import: they are given. A figure taken while
something else was running would make a slow program look good, so the best of several runs counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Probes:
    """The native probes. Each runs for about `seconds` on `threads` threads.

    bandwidth(threads, megabytes, seconds) reads a buffer of that size over and over: GB/s (10⁹ bytes) of each time;
    int8(threads, seconds): int8 multiply-adds, 10¹² operations/s, a multiply-add counting two;
    fp32(threads, seconds): the same in float32.
    """

    bandwidth: Callable[[int, int, float], Sequence[float]]
    int8: Callable[[int, float], float]
    fp32: Callable[[int, float], float]


@dataclass(frozen=True)
class Ceilings:
    """Per second, over all `threads`: bytes read from a working set of `working_set` bytes, and operations."""

    threads: int
    working_set: int
    bandwidth: float
    int8: float
    fp32: float


def measure(probes: Probes, threads: int, working_set: int, *, seconds: float = 0.25, runs: int = 3) -> Ceilings:
    """Run each probe `runs` times and keep the best.

    `working_set` is in bytes: what a step reads. A set that fits into a cache is read at the cache's speed, so that
    a small model is held against the ceiling that applies to it.
    """
    megabytes = max(1, round(working_set / 1e6))
    return Ceilings(
        threads=threads,
        working_set=megabytes * 1_000_000,
        bandwidth=1e9 * max(max(probes.bandwidth(threads, megabytes, seconds)) for _ in range(runs)),
        int8=1e12 * max(probes.int8(threads, seconds) for _ in range(runs)),
        fp32=1e12 * max(probes.fp32(threads, seconds) for _ in range(runs)),
    )


def main_memory_set(caches: dict[str, int], available: int) -> int:
    """A working set in bytes that no cache holds: eight times the last level, within a quarter of free memory."""
    last = max(caches.values(), default=32 << 20)
    return max(1 << 20, min(max(8 * last, 256 << 20), available // 4))


def within(working_set: int, available: int) -> int:
    """A working set in bytes that may be allocated beside everything else: a quarter of free memory at the most."""
    return max(1 << 20, min(working_set, available // 4))


def recall(fingerprint: str, folder: Path) -> Ceilings | None:
    """The ceilings written for this fingerprint, or None. For display only: a benchmark measures anew."""
    try:
        return Ceilings(**json.loads(_file(fingerprint, folder).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def remember(fingerprint: str, ceilings: Ceilings, folder: Path) -> None:
    """Write the ceilings for `recall`. A folder that cannot be written to is no reason to fail."""
    path = _file(fingerprint, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(ceilings)))
        scratch.replace(path)
    except OSError:
        return


def _file(fingerprint: str, folder: Path) -> Path:
    return folder / f"ceilings-{fingerprint}.json"
