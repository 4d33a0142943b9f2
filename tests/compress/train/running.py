"""A small training with everything that has a state, run here or in a process of its own that can be killed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from miaotui.compress.train.distil import Request, distil
from miaotui.compress.train.settings import Settings, Task, Terms
from tests.compress.train.making import TOKENS, tiny

WORDS = "a small model reads what the large one says and learns to say it too until both agree .".split()  # noqa: SIM905


def write_text(path: Path, seed: int = 0, words: int = 1500) -> Path:
    """Words in an order of their own."""
    chance = random.Random(seed)
    path.write_text(" ".join(chance.choice(WORDS) for _ in range(words)))
    return path


SMALL = Settings(
    terms=Terms(kl=1.0, ce=0.3, hidden=0.2, temperature=2.0),
    window=16,
    steps=10,
    batch=6,
    rate=5e-3,
    warmup=3,
    held_out=0.1,
    evaluate_every=4,
    save_every=3,
    precision="fp32",
)


def scribble(folder: Path, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> list[list[int]]:
    """Ids that depend on the student's weights, as an engine's would."""
    sums = (folder / "model.safetensors").read_bytes()[-4096:]
    chance = random.Random(f"{seed} {sums!r}")
    return [[chance.randrange(3, TOKENS - 2) for _ in range(tokens)] for _ in prompts]


def everything(folder: Path, on_policy: float = 0.34) -> Settings:
    """Two tasks, accumulation, and a share that the student writes."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = (Task(str(write_text(folder / "one.txt"))), Task(str(write_text(folder / "two.txt", 1)), 3.0))
    return replace(SMALL, tasks=tasks, on_policy=on_policy, on_policy_every=5, micro_batch=4)


def go(folder: Path, settings: Settings | None = None, **options: Any) -> dict[str, Any]:
    """Train `folder/out` from what lies, or is made, in the folder."""
    teacher = tiny.folder(folder / "teacher")
    student = tiny.folder(folder / "student", seed=1, num_hidden_layers=1, hidden_size=24)
    request = Request(str(student), str(teacher))
    return distil(request, folder / "out", settings or everything(folder), write=scribble, **options)


def _tell() -> Callable[[int, int], None]:
    return lambda done, total: print(done, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    go(Path(sys.argv[1]), everything(Path(sys.argv[1]), float(sys.argv[2])), tell=_tell())
