"""One server for all tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.serving import Server, serving


@pytest.fixture(scope="package")
def shared_server(demo_gguf: Path) -> Iterator[Server]:
    with serving(demo_gguf, max_num_seqs=8, max_model_len=1024) as started:
        yield started


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared server; after each test nothing is left in it."""
    yield shared_server
    shared_server.quiet()
