"""Miaotui beside other engines: same weights, same prompts, same cores, in alternating runs.

    python -m benchmarks.peers [--peers llama.cpp,openvino,vllm,transformers] [--quick]
    python -m benchmarks.peers --shape qwen2.5-7b --peers llama.cpp
    python -m benchmarks.peers --compute int8-batch --kv-cache-dtype int8 --regimes throughput-64

Writes peers.json, peers.md and peers.svg to --output, and the table to stdout. What is measured, and what each peer
needs, stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

from benchmarks.peer_kit import models, report
from miaotui.backends.ops import CacheType, ComputeType
from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.demo import cache_folder
from miaotui.cli.probes import native_probes
from miaotui.hardware import ceilings, detect
from miaotui.hardware.ceilings import Ceilings
from miaotui.hardware.processors import affinity
from miaotui.hardware.sensors import Watch
from miaotui.measure.peers.alone.peer_runners.worker import Config
from miaotui.measure.peers.environments import DEFAULT, PEERS, Peer, PeerUnavailableError, install
from miaotui.measure.peers.pairs import REGIMES, Duel, Moment, Plan, Probe, Regime, same_start, summary
from miaotui.measure.peers.process import Worker
from miaotui.measure.prompts import prose
from miaotui.measure.work import Cost
from miaotui.model.families import read_spec
from miaotui.model.spec import ModelSpec
from miaotui.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 3
QUESTION = "The capital of France is"
PROBE_SECONDS = 0.12
QUICK = Plan(seconds=30, least=1, most=5)
QUICK_REGIMES = ("decode-1@16", "decode-1@512", "prefill-512", "throughput-64")
SHAPE_REGIMES = ("decode-1@16", "decode-1@512", "prefill-512")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    folder = cache_folder() / "peers"
    available, failed = _install_all(options, folder)
    if options.install_only:
        return int(bool(failed))
    subject = Subject(options, folder)
    document = subject.document()
    document["not_measured"] += failed
    for peer, python in available.items():
        try:
            document["peers"].append(subject.compare(peer, python))
        except PeerUnavailableError as error:
            _tell(f"{peer.name}: {error}")
            document["not_measured"].append({"name": peer.name, "why": str(error)})
    _write(options.output, document)
    print(report.markdown(document), end="")
    return int(not document["peers"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; `peers`, `regimes` and `plan` already resolved."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", metavar="A,B,…", help=f"of {', '.join(PEERS)}  [default: {','.join(DEFAULT)}]")
    parser.add_argument("--regimes", metavar="A,B,…", help=f"of {', '.join(REGIMES)}  [default: what suits the peer]")
    parser.add_argument("--shape", choices=sorted(models.SHAPES), help="random weights of this shape, for GGUF readers")
    parser.add_argument("--threads", type=int, default=detect.usable_cores())
    for name, choices in (("--compute", get_args(ComputeType)), ("--kv-cache-dtype", ("auto", *get_args(CacheType)))):
        parser.add_argument(name, choices=choices, default="auto", help="of miaotui  [default: auto]")
    parser.add_argument("--seconds", type=float, help="time to measure one peer in, its start aside  [default: 150]")
    parser.add_argument("--quick", action="store_true", help="about a minute a peer: few pairs, for a first look")
    parser.add_argument("--install-only", action="store_true", help="make the peers' environments, measure nothing")
    parser.add_argument("--output", type=Path, help="folder  [default: benchmarks/results/local[/SHAPE]]")
    options = parser.parse_args(arguments)
    default_peers = "llama.cpp" if options.shape else ",".join(DEFAULT)
    options.peers = _chosen(parser, "--peers", options.peers or default_peers, PEERS)
    options.regimes = options.regimes and _chosen(parser, "--regimes", options.regimes, REGIMES)
    if options.shape and any(peer.weights != "gguf" for peer in options.peers):
        parser.error(
            "--shape is for peers that read GGUF: " + ", ".join(p.name for p in PEERS.values() if p.weights == "gguf")
        )
    if not 1 <= options.threads <= len(affinity()):
        parser.error(f"--threads: choose from 1 to {len(affinity())}")
    plan = QUICK if options.quick else Plan()
    options.plan = plan if options.seconds is None else Plan(options.seconds, plan.least, plan.most)
    chosen = {"compute": options.compute, "kv_cache_dtype": options.kv_cache_dtype}
    options.ours = {name: value for name, value in chosen.items() if value != "auto"}
    options.output = options.output or ROOT / "benchmarks" / "results" / "local" / (options.shape or "") / "-".join(
        f"{name}-{value}" for name, value in options.ours.items()
    )
    return options


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, table: dict[str, Any]) -> list[Any]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        parser.error(f"{option}: {', '.join(unknown) or 'nothing'} is not among {', '.join(table)}")
    return [table[name] for name in dict.fromkeys(names)]


def _install_all(options: argparse.Namespace, folder: Path) -> tuple[dict[Peer, Path], list[dict[str, str]]]:
    """Each peer's Python, and those that cannot be had."""
    available, failed = {}, []
    for peer in options.peers:
        try:
            available[peer] = install(peer, folder, _tell)
        except PeerUnavailableError as error:
            _tell(f"{peer.name}: {error}")
            failed.append({"name": peer.name, "why": str(error)})
    return available, failed


class Subject:
    """The model under comparison and the machine that it runs on."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.weights = folder / "weights"
        _tell("writing the weights, where they are not there yet")
        if options.shape:
            self.gguf = models.random_gguf(self.weights, options.shape)
        else:
            self.gguf = models.demo_gguf(self.weights)
        checkpoint = open_checkpoint(self.gguf)
        self.spec: ModelSpec = read_spec(checkpoint)[0]
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        self.question: list[int] = tokenizer.encode(QUESTION)
        self.text = prose(tokenizer.encode)
        self.cpus = _one_of_each_core(options.threads)

    def document(self) -> dict[str, Any]:
        """The report before any peer: what was measured, where."""
        title = f"{self.options.shape} shape, random weights" if self.options.shape else "SmolLM2-135M-Instruct"
        return {
            "schema": SCHEMA,
            "machine": detect.detect().as_dict(),
            "threads": self.options.threads,
            "options": self.options.ours,
            "cpus": self.cpus,
            "model": {"title": title, **models.describe(self.gguf)},
            "peers": [],
            "not_measured": [],
        }

    def regimes(self, peer: Peer) -> list[Regime]:
        """What was asked for, or what suits the peer, the shape and the time."""
        if self.options.regimes:
            return list(self.options.regimes)
        names = list(SHAPE_REGIMES if self.options.shape else QUICK_REGIMES if self.options.quick else REGIMES)
        return [REGIMES[name] for name in names if peer.regimes is None or name in peer.regimes]

    def compare(self, peer: Peer, python: Path) -> dict[str, Any]:
        """One peer's entry. Raises PeerUnavailableError."""
        _tell(f"{peer.name}: starting")
        regimes = self.regimes(peer)
        make = {"gguf": lambda folder: self.gguf, "bf16": models.demo_bf16, "int4": models.demo_int4}[peer.weights]
        peer_weights = make(self.weights)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        with (
            self._worker("ours", Path(sys.executable), self.gguf, regimes, "ours") as ours,
            self._worker(peer.runner, python, peer_weights, regimes, peer.name) as theirs,
        ):
            start = None if self.options.shape else self._same_start(ours, theirs)
            limits, costs = self._limits(ours, peer, peer_weights)
            duel = Duel(ours, theirs, self.text, _prober(limits), self.options.plan)
            found = zip(regimes, duel.measure(regimes, partial(_tell_of, peer.name)), strict=True)
        return {
            "name": peer.name,
            "when": started,
            "commit": _commit(),
            "versions": theirs.versions,
            "weights": models.describe(peer_weights),
            "settings": theirs.settings,
            "our_settings": ours.settings,
            "start_seconds": theirs.start_seconds,
            "same_start": start,
            "limits": asdict(limits),
            "results": [summary(regime, pairs, costs, limits, self.options.plan.least) for regime, pairs in found],
        }

    def _worker(self, runner: str, python: Path, weights: Path, regimes: Sequence[Regime], name: str) -> Worker:
        streams = max(regime.streams for regime in regimes)
        length = max(regime.prompt + regime.new_tokens for regime in regimes)
        options = self.options.ours if runner == "ours" else {}
        config = Config(str(weights), self.options.threads, self.cpus, streams, -(-length // 256) * 256, options)
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        who = "miaotui itself" if runner == "ours" else "it"
        return Worker(f"peer_runners.{runner}", python, config, logs / f"{name}.log", who)

    def _same_start(self, ours: Worker, theirs: Worker) -> dict[str, Any]:
        found = same_start(ours, theirs, self.question)
        tokenizer = Tokenizer.from_checkpoint(open_checkpoint(self.gguf))
        texts = {engine: tokenizer.decode(found[engine]) for engine in ("ours", "peer")}
        _tell(f"  {found['agree']} of {found['tokens']} tokens of the answer agree: {texts['peer']!r}")
        return {**found, "prompt": QUESTION, "texts": texts}

    def _limits(self, ours: Worker, peer: Peer, peer_weights: Path) -> tuple[Ceilings, dict[str, Cost]]:
        """The machine's limits over our working set, and what each engine's own weights cost at the least."""
        size, block = ours.facts["weight_bytes"], ours.facts["block_bytes"]
        theirs = Cost.of(self.spec, size, block, "auto")
        mine = replace(theirs, greedy_bytes=ours.facts["greedy_bytes"])
        if peer.weights != "gguf":
            theirs = Cost(self.spec, models.describe(peer_weights)["bytes"], mine.cache_bytes, integer=False)
        _pin(self.cpus)
        return ceilings.measure(native_probes(), self.options.threads, size), {"ours": mine, "peer": theirs}


def _prober(limits: Ceilings) -> Probe:
    """Two short probes each, over the working set that `limits` were measured with."""
    probes, threads = native_probes(), limits.threads
    megabytes = limits.working_set // 1_000_000

    def probe() -> Moment:
        watch = Watch()
        rounds = [rate for _ in range(2) for rate in probes.bandwidth(threads, megabytes, PROBE_SECONDS)]
        int8 = max(probes.int8(threads, PROBE_SECONDS) for _ in range(2))
        return Moment(1e9 * max(rounds), 1e12 * int8, watch.read().others, 1e9 * median(rounds))

    return probe


# -- machine and files ---------------------------------------------------------------------------------------
def _one_of_each_core(threads: int) -> list[int]:
    """That many logical processors to run on, each on a core of its own as long as there are cores."""
    cores: dict[str, list[int]] = {}
    for cpu in affinity():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text() if siblings.exists() else str(cpu), []).append(cpu)
    ranked = sorted((rank, cpu) for core in cores.values() for rank, cpu in enumerate(core))
    return sorted(cpu for _, cpu in ranked[:threads])


def _pin(cpus: Sequence[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def _commit() -> str:
    """Of this checkout, with a + when files differ from it; empty outside one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _write(folder: Path, document: dict[str, Any]) -> None:
    """The three files. Peers that an earlier run on this machine and model left in the folder stay in them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "peers.json"
    if path.exists():
        merge(document, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "peers.md").write_text(report.markdown(document), encoding="utf-8")
    if document["peers"]:
        (folder / "peers.svg").write_text(report.chart(document), encoding="utf-8")
    _tell(f"written: {folder}/peers.json, peers.md, peers.svg")


def merge(document: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Take over, into `document`, the peers that it has nothing on from a report that can stand beside it."""

    def setting(one: Mapping[str, Any]) -> tuple[Any, ...]:
        return one["schema"], one["machine"]["fingerprint"], one["threads"], one["options"], one["model"]

    if earlier.get("schema") != SCHEMA or setting(earlier) != setting(document):
        return
    known = {entry["name"] for part in ("peers", "not_measured") for entry in document[part]}
    for part in ("peers", "not_measured"):
        document[part] += [entry for entry in earlier[part] if entry["name"] not in known]
        document[part].sort(key=lambda entry: list(PEERS).index(entry["name"]))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell_of(name: str, line: str) -> None:
    _tell(f"{name}: {line}")


if __name__ == "__main__":
    sys.exit(main())
