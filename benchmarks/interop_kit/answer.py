"""What every reader does: load one artefact, and answer one request on stdin with one line of JSON on stdout.

    → {"path": "…", "windows": [[ids]], "threads": n, "mode": "…"}
    ← {"versions": {}, "settings": {}, "top1": [[ids]]}     for each token but the last: the likeliest next one

Only the standard library is used here, since each engine has an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Request:
    """An artefact, and windows of token ids, all as long as each other. `mode` is a reader's own."""

    path: str
    windows: list[list[int]]
    threads: int
    mode: str


Top1 = tuple[list[list[int]], dict[str, Any]]
"""The likeliest next tokens of each window, and the settings they were found with."""


def answer(ask: Callable[[Request], Top1], packages: Sequence[str]) -> None:
    """What a library prints goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    top1, settings = ask(Request(**json.load(sys.stdin)))
    versions = {package: version(package) for package in packages}
    channel.write(json.dumps({"versions": versions, "settings": settings, "top1": top1}) + "\n")
    channel.flush()
