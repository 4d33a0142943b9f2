"""What every runner does: load, then answer JSON lines on stdin with JSON lines on stdout, one at a time.

    → {"prompts": [[ids]], "new_tokens": n}
    ← {"seconds": s, "arrivals": [s, …], "ids": [[ids]]}      `arrivals` only for a single prompt
    ← {"error": "…"}

The first line out is `{"ready": {"versions": {}, "settings": {}, "facts": {}}}`. Only the standard library is used
here, since each peer has an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Protocol


@dataclass(frozen=True)
class Config:
    """How to load: `weights` is a file or a folder, `streams` and `length` the most sequences and positions.

    options: others of LLM, for miaotui itself.
    """

    weights: str
    threads: int
    cpus: list[int]
    streams: int
    length: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """One greedy run that never stops early. Times in seconds since it began, the prompts still unread.

    `arrivals`: when each new token of a single prompt was known; empty for several prompts.
    """

    seconds: float
    ids: list[list[int]]
    arrivals: list[float] = field(default_factory=list)


class Engine(Protocol):
    """`settings` are what was chosen for speed, for the report; `facts` what the engine knows about its model."""

    settings: dict[str, Any]
    facts: dict[str, Any]

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation: ...


def serve(make: Callable[[Config], Engine], packages: Sequence[str]) -> None:
    """Load by `make` on the processors that the command line's JSON names, and answer until stdin ends."""
    config = Config(**json.loads(sys.argv[1]))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config.cpus)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not get between the answers

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        engine = make(config)
        versions = {package: version(package) for package in packages}
        say({"ready": {"versions": versions, "settings": engine.settings, "facts": engine.facts}})
        for line in sys.stdin:
            say(asdict(engine.generate(**json.loads(line))))
    except Exception as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"})
