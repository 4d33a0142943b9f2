"""What users have today, on the same prompts: peers that are installed, in runs that alternate with the artefact.

A peer reads what it can: GGUF, or plain safetensors. Where neither the artefact nor the original is GGUF, those that
need it get the original as Q8_0. One that is absent, or cannot be measured, is named with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miaotui.accelerate.card.schema import Peer, PeerResult
from miaotui.accelerate.search.ledger import Ledger
from miaotui.accelerate.search.space import DENSE, Candidate, weights_name
from miaotui.accelerate.source import Source
from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.checkpoint.demo import cache_folder
from miaotui.compress.recipe import Recipe
from miaotui.errors import MiaotuiError
from miaotui.hardware import detect
from miaotui.hardware.ceilings import Ceilings
from miaotui.hardware.processors import affinity
from miaotui.hardware.sensors import glance
from miaotui.measure.intervals import Estimate
from miaotui.measure.peers import environments, pairs
from miaotui.measure.peers.alone.peer_runners.worker import Config
from miaotui.measure.peers.environments import PeerUnavailableError
from miaotui.measure.peers.process import Worker
from miaotui.measure.prompts import prose
from miaotui.measure.work import Cost
from miaotui.model.tokenizer import Tokenizer

REGIMES = ("decode-1@512", "prefill-512", "throughput-32")
PLAN = pairs.Plan(seconds=45, least=3, most=9)
QUESTION = "The capital of France is"
OTHERS = 0.25
"""Seconds between two runs in which it is counted what others do."""


@dataclass(frozen=True)
class Against:
    """`artefact` is what to load for ours, with LLM's `options`; `convert` writes a candidate's weights to a path."""

    original: str
    artefact: str
    options: Mapping[str, Any]
    source: Source
    limits: Ceilings
    folder: Path
    ledger: Ledger
    convert: Callable[[Candidate, Path], object]
    tell: Callable[[str], None]

    def measure(self, names: Sequence[str]) -> tuple[Peer, ...]:
        """Each of these peers, measured or with the reason why not."""
        return tuple(self._peer(environments.PEERS[name]) for name in names)

    def _peer(self, peer: environments.Peer) -> Peer:
        python = environments.installed(peer, cache_folder() / "peers")
        if python is None:
            return Peer(peer.name, why="it is not installed (benchmarks/README.md says how its environment is made)")
        found = self.ledger.note(f"peer {peer.name}", lambda: self._compare(peer, python))
        if "why" in found:
            return Peer(peer.name, why=found["why"])
        results = tuple(_result(entry) for entry in found["results"])
        return Peer(peer.name, found["version"], found["weights"], results)

    def _compare(self, peer: environments.Peer, python: Path) -> dict[str, Any]:
        self.tell(f"{peer.name}: starting")
        try:
            weights, what = self._weights(peer)
            return {**self._duel(peer, python, weights), "weights": what}
        except PeerUnavailableError as error:
            return {"why": str(error)}
        except MiaotuiError as error:
            return {"why": error.message}

    def _weights(self, peer: environments.Peer) -> tuple[Path, str]:
        """What the peer reads, and what that is."""
        if peer.weights == "gguf":
            for model, what in ((self.artefact, "the artefact"), (self.original, "the original")):
                path = resolve(model)
                if path.suffix == ".gguf":
                    return path, what
            return self._as_gguf()
        if self.source.format != "safetensors" or self.source.stored not in DENSE:
            raise PeerUnavailableError("it reads plain safetensors, which the original is not")
        return resolve(self.original), f"the original, {self.source.stored}"

    def _as_gguf(self) -> tuple[Path, str]:
        """The original as Q8_0, written once."""
        path = self.folder / "original-q8_0.gguf"
        scheme = "w8g32-sym"
        head = "keep" if self.source.spec.tied_head else scheme
        recipe = Recipe(scheme=scheme, method="rtn", embedding=scheme, head=head, format="gguf")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.convert(Candidate(recipe), path)
        return path, f"the original as {weights_name(recipe)}"

    def _duel(self, peer: environments.Peer, python: Path, weights: Path) -> dict[str, Any]:
        longest = self.source.spec.max_position
        regimes = [pairs.REGIMES[name] for name in REGIMES if peer.regimes is None or name in peer.regimes]
        regimes = [regime for regime in regimes if regime.prompt + regime.new_tokens <= longest]
        with (
            self._worker("ours", Path(sys.executable), self.artefact, regimes, self.options) as ours,
            self._worker(peer.runner, python, str(weights), regimes, {}) as theirs,
        ):
            pairs.same_start(ours, theirs, self._encode(QUESTION))
            duel = pairs.Duel(ours, theirs, prose(self._encode), self._moment, PLAN)
            taken = duel.measure(regimes, lambda line: self.tell(f"{peer.name}: {line}"))
            cost = Cost.of(self.source.spec, ours.facts["weight_bytes"], ours.facts["block_bytes"], "auto")
            costs = {"ours": replace(cost, greedy_bytes=ours.facts["greedy_bytes"]), "peer": cost}
            results = [
                pairs.summary(regime, found, costs, self.limits, PLAN.least)
                for regime, found in zip(regimes, taken, strict=True)
            ]
        return {"version": next(iter(theirs.versions.values()), None), "results": [_plain(entry) for entry in results]}

    def _worker(
        self, runner: str, python: Path, weights: str, regimes: Sequence[pairs.Regime], options: Mapping[str, Any]
    ) -> Worker:
        threads = detect.usable_cores()
        streams = max(regime.streams for regime in regimes)
        length = -(-max(regime.prompt + regime.new_tokens for regime in regimes) // 256) * 256
        config = Config(weights, threads, affinity()[:threads], streams, length, dict(options))
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return Worker(f"peer_runners.{runner}", python, config, logs / f"{runner}.log")

    def _encode(self, text: str) -> list[int]:
        return Tokenizer.from_checkpoint(open_checkpoint(resolve(self.original))).encode(text)

    def _moment(self) -> pairs.Moment:
        """The machine between two runs; its limits are not probed again."""
        return pairs.Moment(self.limits.bandwidth, self.limits.int8, glance(OTHERS).others)


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a card needs of a summary."""
    return {
        "regime": entry["regime"],
        "unit": entry["unit"],
        "ours": entry["ours"]["median"],
        "theirs": entry["peer"]["median"],
        "ratio": [entry["ratio"][name] for name in ("median", "low", "high")],
        "pairs": entry["pairs"],
    }


def _result(entry: Mapping[str, Any]) -> PeerResult:
    median, low, high = entry["ratio"]
    ratio = Estimate(median, None, low, high)
    return PeerResult(entry["regime"], entry["unit"], entry["ours"], entry["theirs"], ratio, entry["pairs"])
