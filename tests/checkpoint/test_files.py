"""Mapped files: what was read does not stay in memory."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from miaotui.checkpoint.files import OF_ONE_TENSOR, MappedFile


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is resident")
def test_what_was_read_is_given_back(tmp_path: Path) -> None:
    """Also where a tensor's arrays are read only once all of them were handed out."""
    size, count = 4 << 20, 24
    path = tmp_path / "arrays"
    path.write_bytes(np.random.default_rng(0).bytes(size * count))
    file = MappedFile(path)
    total = 0
    for first in range(0, count, 2):
        pair = [file.array(i * size, (size,), np.uint8) for i in (first, first + 1)]
        total += sum(int(one.sum(dtype=np.int64)) for one in pair)
    assert total == int(np.fromfile(path, np.uint8).sum(dtype=np.int64))
    assert resident(path) <= (OF_ONE_TENSOR + 1) * size


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    mappings = Path("/proc/self/smaps").read_text().split(str(path))
    return int(re.search(r"Rss:\s+(\d+) kB", mappings[1])[1]) << 10  # type: ignore[index]
