"""What the control groups (v1 and v2) around this process allow: processors and memory.

Every function takes `root`, the folder that holds `proc` and `sys`, so that a test can lay out a machine of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str | None:
    """The file's text without surrounding space, or None when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """The file's text as an integer; None when it is absent or says something else (`max`)."""
    text = read_text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The process's group for `controller` and its ancestors, innermost first: each of them limits the process.

    Inside a container the path that /proc names may lie outside what is mounted; then the mount's top is the group.
    """
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            tops = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            tops = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        top = next((top for top in tops if top.is_dir()), None)
        if top is None:
            continue
        folder = top / group.strip("/")
        while folder != top:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield top


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the process may use, such as 1.5; None means no limit."""
    quotas = []
    for folder in folders("cpu", root):
        words = (read_text(folder / "cpu.max") or "").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = read_int(folder / "cpu.cfs_quota_us"), read_int(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """The smallest memory limit over the process's groups, in bytes; None means no limit."""
    limits = [limit for limit, _ in _memory_groups(root)]
    return min(limits, default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes the process's groups still allow; file pages that the kernel can drop count as free. None: no limit."""
    left = [max(0, limit - used) for limit, used in _memory_groups(root)]
    return min(left, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each group that has a limit."""
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in folders("memory", root):
        for limit_name, usage_name, droppable_name in names:
            limit, usage = read_int(folder / limit_name), read_int(folder / usage_name)
            if limit is None or usage is None or limit >= 1 << 60:  # v1 writes "no limit" as a huge number
                continue
            statistics = (line.split() for line in (read_text(folder / "memory.stat") or "").splitlines())
            droppable = next((int(words[1]) for words in statistics if words[0] == droppable_name), 0)
            yield limit, max(0, usage - droppable)
