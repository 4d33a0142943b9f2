"""What can be tried on this model and this machine, and what cannot help or does not run here, with the reason.

A candidate is two things. What is written: the recipe of the weights. And how that is served: number types of
activations and cache, threads, speculation, bounds of a batch; those are recommended in the artefact (`settings.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from miaotui.accelerate.goals import Goal
from miaotui.accelerate.source import Source
from miaotui.compress.recipe import Budget, Calibration, Recipe, parse_scheme

METHODS = ("rtn", "hqq", "awq", "gptq", "awq+gptq")
"""From the quickest to the one that loses least, as a rule."""
SCHEMES = (
    "w4g128-sym", "w4g64-sym", "w4g32-sym", "w4g128-asym", "w4g64-asym", "w4g32-asym", "w8-sym", "w8g32-sym",
)  # fmt: skip
BUDGETS = (4.75, 5.5, 6.5)
MIXED = ("w4g64-sym", "w8g64-sym")
TABLES = ("w8-sym", "keep")
"""What becomes of the table of tokens and of the head."""
GGUF_SCHEMES = ("w4g32-sym", "w4g32-asym", "w8g32-sym")

NOT_HERE = (
    ("weights in 2 or 3 bits", "this machine's kernels hold them in 4 bits: no byte is saved, and more is lost"),
    ("fp8 weights", "this machine has no kernels that multiply fp8"),
)


@dataclass(frozen=True)
class Serving:
    """How a model is served; the words and defaults are LLM's."""

    compute: str = "auto"
    kv_cache_dtype: str = "auto"
    threads: int | None = None
    speculative: str | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512

    def options(self) -> dict[str, Any]:
        """LLM's keyword arguments, where they are not its defaults."""
        return {name: value for name, value in asdict(self).items() if value != getattr(DEFAULT, name)}


DEFAULT = Serving()


@dataclass(frozen=True)
class Candidate:
    """Weights by `recipe` (None: the original's), served so."""

    recipe: Recipe | None
    serving: Serving = DEFAULT

    @cached_property
    def key(self) -> str:
        """Names it in the journal: the same for the same candidate, always."""
        return _digest({"recipe": self.weights_key, "serving": asdict(self.serving)})

    @cached_property
    def weights_key(self) -> str:
        """The same for the same weights."""
        return "original" if self.recipe is None else _digest(self.recipe.plain())

    @property
    def answers_key(self) -> str:
        """The same for candidates that give the same answers: threads, batches and speculation change none."""
        return f"{self.weights_key} {self.serving.compute} {self.serving.kv_cache_dtype}"

    @property
    def name(self) -> str:
        """For people."""
        parts = [weights_name(self.recipe)]
        words = {
            "compute": "computed in {}", "kv_cache_dtype": "{} cache", "threads": "{} threads",
            "speculative": "{} speculation", "max_num_seqs": "{} sequences",
            "max_num_batched_tokens": "{} tokens a step",
        }  # fmt: skip
        return ", ".join([*parts, *(words[name].format(value) for name, value in self.serving.options().items())])

    def features(self) -> dict[str, str]:
        """Every choice that was made, by dimension."""
        recipe = self.recipe
        weights = {"scheme": "original", "method": "none", "table": "keep"}
        if recipe is not None:
            scheme = recipe.scheme if recipe.budget is None else f"{recipe.budget.bits:g} bits"
            weights = {"scheme": scheme, "method": recipe.method, "table": recipe.embedding}
        return {**weights, **{name: str(value) for name, value in asdict(self.serving).items()}}

    def served(self, **changes: Any) -> Candidate:
        """The same weights, served otherwise."""
        return replace(self, serving=replace(self.serving, **changes))


ORIGINAL = Candidate(None)


def weights_name(recipe: Recipe | None) -> str:
    """For people: `w4g64-sym by gptq, tokens w8-sym`."""
    if recipe is None:
        return "the original's weights"
    scheme = (
        recipe.scheme if recipe.budget is None else f"{recipe.budget.bits:g} bits of {'/'.join(recipe.budget.choices)}"
    )
    table = {recipe.embedding, recipe.head} - {"keep"}
    return f"{scheme} by {recipe.method}" + (f", tokens {'/'.join(sorted(table))}" if table else "")


def average_bits(recipe: Recipe, width: int) -> float:
    """Bits of a weight of the layers, scales included."""
    return recipe.budget.bits if recipe.budget is not None else parse_scheme(recipe.scheme).bits(width)


@dataclass(frozen=True)
class Space:
    """`weights`: every recipe, served by default. `servings`: every other way to serve. `dropped`: (what, why)."""

    weights: tuple[Candidate, ...]
    servings: tuple[Serving, ...]
    dropped: tuple[tuple[str, str], ...] = field(default=())


def make_space(source: Source, goal: Goal, cores: int, processors: int, calibration: Calibration) -> Space:
    """Everything that this source can become and this machine runs."""
    dropped = list(NOT_HERE)
    schemes = list(_fitting(source, dropped))
    tied, gguf = source.spec.tied_head, source.format == "gguf"
    bases = [
        Recipe(scheme=scheme, method=method, embedding=table, head="keep" if tied else table, calibration=calibration,
               format="gguf" if gguf else "compressed-tensors")
        for scheme, method, table in product(schemes, METHODS, TABLES)
        if not (gguf and table == "w8-sym")
    ]  # fmt: skip
    mixed = []
    if not gguf and all(scheme in schemes for scheme in ("w4g64-sym", "w8-sym")):
        mixed = [
            replace(base, scheme=MIXED[0], budget=Budget(bits, MIXED))
            for base in bases
            if base.scheme == MIXED[0] and base.method in ("rtn", "gptq")
            for bits in BUDGETS
        ]
    recipes = [*bases, *mixed]
    computes = ("auto", "fp32")
    weights = tuple(Candidate(recipe, Serving(compute=compute)) for recipe in recipes for compute in computes)
    return Space(weights, tuple(_servings(goal, cores, processors)), tuple(dropped))


def _fitting(source: Source, dropped: list[tuple[str, str]]) -> Iterator[str]:
    """Schemes whose groups divide every row, so that other programs load them too; for GGUF, those that it holds."""
    for scheme in SCHEMES:
        weights = parse_scheme(scheme).weights
        assert weights is not None
        ragged = next((w for w in source.widths if weights.group_size and w % weights.group_size), None)
        if source.format == "gguf":
            if scheme in GGUF_SCHEMES:
                yield scheme
            continue
        if ragged is not None:
            dropped.append((scheme, f"its groups do not divide rows of {ragged}, which other programs refuse"))
        elif scheme != "w8g32-sym":
            yield scheme


def _servings(goal: Goal, cores: int, processors: int) -> Iterator[Serving]:
    """Every way but the default, those that differ least from it first."""
    threads: Sequence[int | None] = [None, *sorted({max(1, cores // 2), processors} - {cores})]
    guesses = (None, "ngram") if goal in ("latency", "balanced") else (None,)
    sequences = {"latency": (64,), "memory": (64, 8), "throughput": (64, 128, 32), "balanced": (64,)}[goal]
    tokens = {
        "latency": (512, 256, 1024),
        "memory": (512, 128),
        "throughput": (512, 1024, 2048),
        "balanced": (512, 1024),
    }[goal]
    every = (
        Serving("auto", kv, count, guess, most, step)
        for kv, count, guess, most, step in product(("auto", "int8"), threads, guesses, sequences, tokens)
    )
    yield from sorted((s for s in every if s != DEFAULT), key=lambda s: len(s.options()))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
