"""A rival (the original, or another candidate) and a candidate, timed in turn: what both do, they do on the same
prompts, one right after the other.

Prompts are pieces of the text that is chosen by, and answers are sampled as `miaotui run` does by default: random
tokens and greedy answers go round in circles, which would flatter whatever guesses tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miaotui.accelerate.goals import COSTS, Goal, Workload
from miaotui.accelerate.search.space import Serving
from miaotui.accelerate.search.trial import Duel
from miaotui.engine.llm import LLM
from miaotui.engine.params import SamplingParams
from miaotui.hardware.sensors import Watch
from miaotui.measure import speed

TEMPERATURE = 0.7


@dataclass(frozen=True)
class Side:
    """A model as it is served."""

    model: str
    serving: Serving

    def settings(self) -> speed.Settings:
        options = self.serving.options()
        return speed.Settings(self.model, options, flags_of(options))


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """The command line's spelling of LLM's options. What is not given is given as the default: an artefact's own
    recommendations must not come in between."""
    every = {"speculative": "none", "compute": "auto", "kv_cache_dtype": "auto", "greedy_screen": True, **options}
    return ["--raw", *(part for name, value in every.items() for part in _flag(name.replace("_", "-"), value))]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


class Duellist:
    """Owns the last two that it timed while they are in memory; `rest` frees both."""

    def __init__(self, goal: Goal, load: Workload, text: Sequence[int], seed: int) -> None:
        """`text`: token ids to cut prompts from."""
        self._goal, self._load, self._text, self._seed = goal, load, text, seed
        self._loaded: dict[Side, LLM] = {}

    def fight(self, rival: Side, candidate: Side, rounds: int) -> Duel:
        """So many rounds of both. Raises whatever loading them does."""
        if any(cost != "memory" for cost in COSTS[self._goal]):
            self._make_ready(rival, candidate)
        watch = Watch()
        before, after = [], []
        for number in range(rounds):
            first = number % 2 == 0
            pair = [self._measure(side, number) for side in ((rival, candidate) if first else (candidate, rival))]
            before.append(pair[0 if first else 1])
            after.append(pair[1 if first else 0])
        return Duel(tuple(before), tuple(after), watch.read().others)

    def rest(self) -> None:
        """Free both."""
        for llm in self._loaded.values():
            llm.close()
        self._loaded.clear()

    # -- inside ------------------------------------------------------------------------------------------
    def _make_ready(self, *sides: Side) -> None:
        """Both loaded and warmed up, nothing else."""
        for side in [side for side in self._loaded if side not in sides]:
            self._loaded.pop(side).close()
        for side in sides:
            if side not in self._loaded:
                longest = self._load.longest + 16
                options = {**side.serving.options(), "enable_prefix_caching": False, "max_model_len": longest}
                self._loaded[side] = LLM(side.model, **options)
                self._answer(self._loaded[side], random.Random(0), short=True)

    def _measure(self, side: Side, number: int) -> dict[str, float]:
        """One round of every cost of the goal; the same prompts and seeds for the same number."""
        figures: dict[str, float] = {}
        for cost in COSTS[self._goal]:
            chance = random.Random(f"{self._seed} {cost} {number}")
            match cost:
                case "answer":
                    figures[cost] = self._answer(self._loaded[side], chance)
                case "streams":
                    figures[cost] = self._streams(self._loaded[side], chance)
                case "memory":
                    figures[cost] = speed.peak_memory(side.settings())
        return figures

    def _answer(self, llm: LLM, chance: random.Random, *, short: bool = False) -> float:
        """Seconds for one answer."""
        prompt = self._prompt(self._load.prompt, chance)
        started = time.perf_counter()
        llm.generate([prompt], _params(8 if short else self._load.answer, chance))
        return time.perf_counter() - started

    def _streams(self, llm: LLM, chance: random.Random) -> float:
        """Seconds for a new token of all that come at once."""
        load = self._load
        prompts = [self._prompt(load.stream_prompt, chance) for _ in range(load.streams)]
        params = [_params(load.stream_answer, chance) for _ in prompts]
        started = time.perf_counter()
        llm.generate(prompts, params)
        return (time.perf_counter() - started) / (load.streams * load.stream_answer)

    def _prompt(self, tokens: int, chance: random.Random) -> dict[str, list[int]]:
        at = chance.randrange(max(1, len(self._text) - tokens))
        piece = list(self._text[at : at + tokens])
        return {"prompt_token_ids": (piece * -(-tokens // len(piece)))[:tokens]}


def _params(tokens: int, chance: random.Random) -> SamplingParams:
    return SamplingParams(temperature=TEMPERATURE, max_tokens=tokens, ignore_eos=True, seed=chance.randrange(1 << 31))
