"""Do other engines find in our artefacts what we find in them?

    python -m benchmarks.interop ARTEFACT... [--engines transformers,vllm] [--windows 8] [--window 256]

Folders are read by transformers with compressed-tensors and by vLLM's CPU build, GGUF files by llama.cpp. All read the
same tokens, and after each name the likeliest next one: how often that is Miaotui's choice is printed, with a 95%
interval over windows. `text` are windows of a text that no model wrote; `answers` are Miaotui's own greedy answers to
the beginnings of such windows, of which the answer's tokens count. Miaotui runs in float32 (`--compute`). `gap` is by
how much its logit of its own choice exceeds that of the other's, where they differ: 0 is a tie.

Exits 1 when an agreement is below `--floor`. An engine that cannot be had is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.interop_kit.answer import Request
from benchmarks.peer_kit.environments import PEERS, PeerUnavailableError, install
from miaotui.measure.quality_data import Window
from miaotui.measure.scoring import Opened, Scorer, Settings

HOME = Path(os.environ.get("MIAOTUI_HOME", "~/.cache/miaotui")).expanduser()
ROOT = Path(__file__).resolve().parents[1]
PROMPT = 32
"""Tokens of a text that Miaotui answers."""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Reader:
    """An engine: the module that asks it and how, which artefacts it reads, and the peer whose environment it is in.

    Without a peer it is in ours.
    """

    module: str
    gguf: bool
    peer: str | None
    mode: str = "served"


READERS = {
    "transformers": Reader("transformers_top1", False, None),
    "vllm": Reader("vllm_top1", False, "vllm"),
    "llama.cpp": Reader("llama_cpp_top1", True, "llama.cpp"),
    "llama.cpp-float32": Reader("llama_cpp_top1", True, "llama.cpp", "float32"),
}


@dataclass(frozen=True)
class Agreement:
    """One engine on one artefact. `low`, `high`: 95% bootstrap interval over windows; gaps of tokens that differ."""

    artefact: str
    engine: str
    kind: str
    compute: str
    tokens: int
    agreement: float
    low: float
    high: float
    gap_median: float
    gap_largest: float
    versions: dict[str, str]
    settings: dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", nargs="+", type=Path)
    parser.add_argument("--engines", default=",".join(READERS))
    parser.add_argument("--compute", default="fp32", help="of Miaotui: fp32, or auto (what it serves with)")
    parser.add_argument("--text", type=Path, default=HOME / "bench" / "held_out.txt")
    parser.add_argument("--windows", type=int, default=8, help="of each kind")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--floor", type=float, default=0.99)
    parser.add_argument("--output", type=Path, help="a file for the figures as JSON")
    args = parser.parse_args()
    found: list[Agreement] = []
    missing = False
    for artefact in args.artefacts:
        ours = Ours(artefact, args.compute, args.threads, draw(artefact, args.text, args.windows, args.window))
        for engine in readers_of(artefact, args.engines.split(",")):
            try:
                theirs = ask(engine, artefact, [*ours.windows["text"], *ours.windows["answers"]], args.threads)
            except PeerUnavailableError as error:
                print(f"{artefact.name}  {engine}: not measured, {error}", flush=True)
                missing = True
                continue
            for result in ours.compare(engine, theirs):
                found.append(result)
                print(line(result), flush=True)
    if args.output:
        args.output.write_text(json.dumps([asdict(result) for result in found], indent=2) + "\n")
    return int(missing or any(result.agreement < args.floor for result in found))


def readers_of(artefact: Path, engines: Sequence[str]) -> Iterator[str]:
    return (engine for engine in engines if READERS[engine].gguf == artefact.is_file())


def draw(artefact: Path, text: Path, count: int, size: int) -> list[Ids]:
    """Windows end to end from the text, each with BOS where the tokenizer puts one."""
    tokenizer = Opened.of(str(artefact)).tokenizer
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    each = size - len(bos)
    if len(ids) < count * each:
        raise SystemExit(f"{text} has {len(ids)} tokens, not {count} windows of {size}.")
    return [np.array(bos + ids[at * each : (at + 1) * each], np.int32) for at in range(count)]


def ask(engine: str, artefact: Path, windows: Sequence[Ids], threads: int) -> dict[str, Any]:
    """An engine's answer; see `interop_kit.answer`. Raises PeerUnavailableError."""
    reader = READERS[engine]
    python = Path(sys.executable)
    if reader.peer is not None:
        python = install(PEERS[reader.peer], HOME / "peers", lambda text: print(text, file=sys.stderr))
    request = Request(str(artefact.resolve()), [window.tolist() for window in windows], threads, reader.mode)
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    openmp = python.parent.parent / "lib" / "libiomp5.so"  # as vLLM's guide asks
    if reader.peer is not None and openmp.exists():
        variables["LD_PRELOAD"] = str(openmp)
    done = subprocess.run(
        [str(python), "-m", f"benchmarks.interop_kit.{reader.module}"],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=variables,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it wrote nothing"]
        raise PeerUnavailableError(lines[-1].strip()[:300])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class Ours:
    """Miaotui's own reading of one artefact: its answers, and its logits, a window at a time."""

    def __init__(self, artefact: Path, compute: str, threads: int, text: list[Ids]) -> None:
        self.artefact, self.compute, self.size = artefact, compute, len(text[0])
        kv = "fp32" if compute == "fp32" else "auto"
        self.settings = Settings(device="cpu", compute=compute, kv_cache_dtype=kv, threads=threads)
        scorer = self._load()
        try:
            prompts = [window[:PROMPT] for window in text]
            answers = scorer.greedy(prompts, self.size - PROMPT)
        finally:
            scorer.close()
        joined = [np.concatenate([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        self.windows = {"text": text, "answers": joined}

    def _load(self) -> Scorer:
        return Opened.of(str(self.artefact)).load(self.settings, self.size)

    def compare(self, engine: str, theirs: dict[str, Any]) -> Iterator[Agreement]:
        """By kind of window. Our memory is freed before the next engine is asked."""
        scorer, top1 = self._load(), iter(theirs["top1"])
        try:
            for kind, windows in self.windows.items():
                first = PROMPT if kind == "answers" else 1
                gaps = np.array([gap(scorer, window, next(top1), first) for window in windows])
                yield summary(self.artefact.name, engine, kind, self.compute, gaps, theirs)
        finally:
            scorer.close()


def gap(scorer: Scorer, window: Ids, top1: Sequence[int], first: int) -> NDArray[np.float32]:
    """For each token from `first` on: by how much our likeliest exceeds theirs."""
    logits = np.concatenate([np.array(rows) for rows in scorer.logits(Window(window))])
    gaps: NDArray[np.float32] = logits.max(axis=1) - logits[np.arange(len(logits)), np.array(top1)]
    return gaps[first - 1 :]


def summary(
    artefact: str, engine: str, kind: str, compute: str, gaps: NDArray[np.float32], theirs: dict[str, Any]
) -> Agreement:
    """gaps `[windows, tokens]`: 0 where both chose the same."""
    same = (gaps == 0).mean(axis=1)
    draws = np.random.default_rng(0).integers(0, len(same), (10_000, len(same)))
    low, high = np.quantile(same[draws].mean(axis=1), (0.025, 0.975))
    apart = gaps[gaps > 0]
    median, largest = (float(np.median(apart)), float(apart.max())) if apart.size else (0.0, 0.0)
    return Agreement(artefact, engine, kind, compute, gaps.size, float(same.mean()), float(low), float(high), median,
                     largest, theirs["versions"], theirs["settings"])  # fmt: skip


def line(result: Agreement) -> str:
    share = f"{result.agreement:.2%} of {result.tokens} tokens [{result.low:.2%}, {result.high:.2%}]"
    gap = f"gap where they differ: median {result.gap_median:.3f}, largest {result.gap_largest:.3f}"
    return f"{result.artefact}  {result.engine}  {result.kind}: {share}; {gap}"


if __name__ == "__main__":
    sys.exit(main())
