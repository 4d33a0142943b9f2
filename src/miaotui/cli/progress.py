"""A progress bar on stderr, for work that takes over a second at a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

PATIENCE = 1.0
"""Seconds before a bar appears."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be told (done, in all), as often as one likes; where stderr is no terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    started = time.perf_counter()
    with ExitStack() as stack:
        show: Callable[[int, int], None] | None = None

        def tell(done: int, total: int) -> None:
            nonlocal show
            if show is None and time.perf_counter() - started > PATIENCE:
                show = stack.enter_context(_bar(what))
            if show is not None:
                show(done, total)

        yield tell


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
