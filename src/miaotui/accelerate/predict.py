"""The ceiling model: how good a candidate could be at the most, before anything is built.

Bytes ÷ bandwidth and operations ÷ peak, with the machine's measured limits. It orders candidates; it is never shown as
a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from miaotui.accelerate import goals
from miaotui.accelerate.goals import Figures, Goal
from miaotui.accelerate.source import Source
from miaotui.accelerate.space import Candidate, average_bits
from miaotui.compress.recipe import parse_scheme
from miaotui.hardware.ceilings import Ceilings
from miaotui.measure.fit import HEADROOM
from miaotui.measure.work import Cost, parameters, parameters_read

CACHE_BYTES = {"auto": 2.0, "bf16": 2.0, "fp32": 4.0, "int8": 1.0625}
"""Of one number; int8 has a 16-bit scale for every 32 or so."""


@dataclass(frozen=True)
class Predictor:
    """For one original on one machine."""

    source: Source
    limits: Ceilings

    def gain(self, goal: Goal, candidate: Candidate) -> float:
        """How many times as good as the original, both at their ceilings."""
        return goals.gain(goal, self.figures(Candidate(None)), self.figures(candidate))

    def figures(self, candidate: Candidate) -> Figures:
        """Every cost at its ceiling. Threads are taken to be those of `limits`: they are measured, not modelled."""
        cost, limits = self._cost(candidate), self.limits
        prefill = cost.seconds(cost.step([goals.PROMPT], new_tokens=goals.PROMPT), limits)
        token = cost.seconds(cost.step([goals.PROMPT + goals.ANSWER // 2]), limits)
        served = min(goals.STREAMS, candidate.serving.max_num_seqs)
        prompts = cost.seconds(cost.step([goals.STREAM_PROMPT] * served, new_tokens=goals.STREAM_PROMPT), limits)
        step = cost.seconds(cost.step([goals.STREAM_PROMPT + goals.STREAM_ANSWER // 2] * served), limits)
        streams = (prompts + goals.STREAM_ANSWER * step) / (served * goals.STREAM_ANSWER)
        cache = cost.cache_bytes * (goals.PROMPT + goals.ANSWER)
        return {
            "answer": prefill + goals.ANSWER * token,
            "streams": streams,
            "memory": self.weight_bytes(candidate) + cache + HEADROOM,
        }

    def weight_bytes(self, candidate: Candidate) -> int:
        """Of all weights, as they would be stored."""
        if candidate.recipe is None:
            return self.source.weight_bytes
        spec = self.source.spec
        tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied_head else 2)
        return int(self._bytes(candidate, parameters(spec) - tables, tables))

    def _cost(self, candidate: Candidate) -> Cost:
        spec = self.source.spec
        head = spec.vocab_size * spec.hidden_size
        read = self.source.step_bytes
        if candidate.recipe is not None:
            read = int(self._bytes(candidate, parameters_read(spec) - head, head))
        integer = read / parameters_read(spec) < 1.5 and candidate.serving.compute != "fp32"
        numbers = sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in spec.layers)
        return Cost(spec, read, numbers * CACHE_BYTES[candidate.serving.kv_cache_dtype], integer)

    def _bytes(self, candidate: Candidate, linears: int, tables: int) -> float:
        recipe = candidate.recipe
        assert recipe is not None
        width = min(self.source.widths, default=self.source.spec.hidden_size)
        table = parse_scheme(recipe.embedding).bits(self.source.spec.hidden_size)
        return (linears * average_bits(recipe, width) + tables * table) / 8
