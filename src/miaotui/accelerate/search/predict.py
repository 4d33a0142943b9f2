"""The ceiling model: how good a candidate could be at the most, before anything is built.

Bytes ÷ bandwidth and operations ÷ peak, with the machine's measured limits. It orders candidates; it is never shown as
a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from miaotui.accelerate import goals
from miaotui.accelerate.goals import COSTS, Figures, Goal, Workload
from miaotui.accelerate.search.space import DENSE, Candidate, average_bits
from miaotui.accelerate.source import Source
from miaotui.compress.recipe import Recipe, parse_scheme
from miaotui.hardware.ceilings import Ceilings
from miaotui.measure.fit import HEADROOM
from miaotui.measure.speed import DECODE_TOKENS, LONGEST, REQUEST
from miaotui.measure.work import Cost, parameters, parameters_read
from miaotui.model.spec import ModelSpec

PROCESS = 0.4
"""Seconds that a process takes to start, as a rule."""
CACHE_BYTES = {"auto": 2.0, "bf16": 2.0, "fp32": 4.0, "int8": 1.0625}
"""Of one number; int8 has a 16-bit scale for every 32 or so."""


@dataclass(frozen=True)
class Predictor:
    """For one original on one machine."""

    source: Source
    limits: Ceilings
    load: Workload = field(default_factory=Workload)

    def gain(self, goal: Goal, candidate: Candidate) -> float:
        """How many times as good as the original, both at their ceilings."""
        return goals.gain(goal, self.figures(Candidate(None)), self.figures(candidate))

    def figures(self, candidate: Candidate) -> Figures:
        """Every cost at its ceiling. Threads are taken to be those of `limits`: they are measured, not modelled."""
        cost, limits, load = self._cost(candidate), self.limits, self.load
        prefill = cost.seconds(cost.step([load.prompt], new_tokens=load.prompt), limits)
        token = cost.seconds(cost.step([load.prompt + load.answer // 2]), limits)
        served = min(load.streams, candidate.serving.max_num_seqs)
        prompts = cost.seconds(cost.step([load.stream_prompt] * served, new_tokens=load.stream_prompt), limits)
        step = cost.seconds(cost.step([load.stream_prompt + load.stream_answer // 2] * served), limits)
        streams = (prompts + load.stream_answer * step) / (served * load.stream_answer)
        return {
            "answer": prefill + load.answer * token,
            "streams": streams,
            "memory": self.weight_bytes(candidate)
            + self._screen_bytes(candidate)
            + cost.cache_bytes * load.longest
            + HEADROOM,
        }

    def round_seconds(self, goal: Goal) -> float:
        """About what the original takes for one round of what a duel of this goal measures, at its ceiling."""
        figures, load = self.figures(Candidate(None)), self.load
        each = {
            "answer": figures["answer"],
            "streams": figures["streams"] * load.streams * load.stream_answer,
            "memory": figures["answer"],
        }
        return sum(each[cost] for cost in COSTS[goal])

    def regime_seconds(self, candidate: Candidate) -> dict[str, float]:
        """About how long one sample of each regime of `measure.speed` takes at the least."""
        cost, limits = self._cost(candidate), self.limits

        def step(contexts: list[int], new_tokens: int = 1) -> float:
            return cost.seconds(cost.step(contexts, new_tokens), limits)

        def decode(context: int) -> float:
            return step([context], context) + DECODE_TOKENS * step([context])

        def throughput(requests: int) -> float:
            return step([REQUEST] * requests, REQUEST) + REQUEST * step([3 * REQUEST // 2] * requests)

        read = PROCESS + 4 * self.weight_bytes(candidate) / limits.bandwidth
        longest = min(LONGEST, self.source.spec.max_position - DECODE_TOKENS - 1)
        return {
            "start": read + step([64], 64),
            "load": read,
            "peak-memory": read + step([256], 256) + DECODE_TOKENS * step([256]),
            "prefill-512": step([512], 512),
            "decode-1@16": decode(16),
            "decode-1@512": decode(512),
            "throughput-8": throughput(8),
            "throughput-64": throughput(64),
            "decode-1@long": decode(longest),
        }

    def weight_bytes(self, candidate: Candidate) -> int:
        """Of all weights, as they would be stored."""
        if candidate.recipe is None:
            return self.source.weight_bytes
        spec = self._spec(candidate)
        tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied_head else 2)
        return int(self._bytes(candidate, parameters(spec) - tables, tables))

    def _cost(self, candidate: Candidate) -> Cost:
        spec = self._spec(candidate)
        head = spec.vocab_size * spec.hidden_size
        read = self.source.step_bytes
        if candidate.recipe is not None:
            read = int(self._bytes(candidate, parameters_read(spec) - head, head))
        integer = read / parameters_read(spec) < 1.5 and candidate.serving.compute != "fp32"
        integer_head = integer and (candidate.recipe is None or self._codes_head(candidate.recipe))
        numbers = sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in spec.layers)
        return Cost(spec, read, numbers * CACHE_BYTES[candidate.serving.kv_cache_dtype], integer, integer_head)

    def _screen_bytes(self, candidate: Candidate) -> float:
        """Of the head once more in 4 bits, with a scale for every 32 of them."""
        spec = self.source.spec
        return 4.5 / 8 * spec.vocab_size * spec.hidden_size if candidate.serving.greedy_screen else 0.0

    def _codes_head(self, recipe: Recipe) -> bool:
        scheme = recipe.embedding if self.source.spec.tied_head else recipe.head
        return parse_scheme(scheme).weights is not None or self.source.stored not in DENSE

    def _spec(self, candidate: Candidate) -> ModelSpec:
        """With as many layers as are left."""
        spec = self.source.spec
        return spec if candidate.blocks is None else replace(spec, layers=spec.layers[: candidate.blocks])

    def _bytes(self, candidate: Candidate, linears: int, tables: int) -> float:
        recipe = candidate.recipe
        assert recipe is not None
        width = min(self.source.widths, default=self.source.spec.hidden_size)
        table = parse_scheme(recipe.embedding).bits(self.source.spec.hidden_size)
        return (linears * average_bits(recipe, width) + tables * table) / 8
