"""One compression: everything that decides its result, and where that goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from miaotui.compress.calibrate import Statistics
from miaotui.compress.options import Steps, steps_of
from miaotui.compress.places import Model
from miaotui.compress.recipe import Precision, Recipe, parse_scheme
from miaotui.compress.rotated import Rotations
from miaotui.compress.text.data import CalibrationText
from miaotui.compress.types import LinearScheme, Place
from miaotui.errors import UsageError
from miaotui.model.spec import ModelSpec
from miaotui.quant.scheme import ScaleType

LAYOUT = 3
"""Of what is solved by which arithmetic; part of what a part belongs to."""


@dataclass(frozen=True, eq=False)
class Work:
    """Everything that decides the result, and where it goes. `schemes` are those that a budget chose."""

    model: Model
    recipe: Recipe
    folder: Path
    text: CalibrationText | None
    statistics: Statistics | None
    precision: Precision
    device: str = "cpu"
    schemes: Mapping[Place, LinearScheme] = field(default_factory=dict)

    @cached_property
    def steps(self) -> Steps:
        return steps_of(self.recipe, self.model.spec)

    @cached_property
    def rotations(self) -> Rotations | None:
        return None if self.steps.rotate is None else Rotations.of(self.model.spec, self.steps.rotate)

    @cached_property
    def scale_type(self) -> ScaleType:
        return scale_type_of(self.recipe, self.model)

    @cached_property
    def belongs_to(self) -> str:
        """The same for the same result."""
        text = None if self.text is None else self.text.fingerprint
        schemes = sorted((str(place), str(scheme)) for place, scheme in self.schemes.items())
        parts = [LAYOUT, self.model.checkpoint.fingerprint(), self.recipe.plain(), text, self.precision, schemes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def scheme_of(self, place: Place) -> LinearScheme:
        chosen = self.schemes.get(place)
        if chosen is not None:
            return chosen
        name = place.name(self.model.names).removesuffix(".weight")
        return self.recipe.scheme_of(name, self.scale_type)

    def table_scheme(self, role: str) -> LinearScheme:
        """Of the embedding or the head."""
        return parse_scheme(self.recipe.embedding if role == "embedding" else self.recipe.head, self.scale_type)

    @property
    def sequential(self) -> bool:
        """Whether a layer needs what the solved layers before it give."""
        return self.recipe.propagate or self.steps.qat is not None

    @property
    def staged(self) -> bool:
        """Whether a layer is rounded group by group, refitted to what the original gave."""
        return self.recipe.propagate and self.steps.rounder == "gptq" and self.steps.gptq.correct


def scale_type_of(recipe: Recipe, model: Model) -> ScaleType:
    """The type of scales: what the recipe says, else float16 for GGUF, else the model's own 16-bit type."""
    if recipe.scale_type != "auto":
        return recipe.scale_type
    config = model.checkpoint.config
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    return "float16" if recipe.format == "gguf" or own == "float16" else "bfloat16"


def check_tables(recipe: Recipe, steps: Steps, spec: ModelSpec) -> None:
    """Raises UsageError for a head with a scheme of its own where it is the embedding."""
    rotated = steps.rotate is not None and steps.rotate.r1
    if spec.tied_head and not rotated and recipe.head not in ("keep", recipe.embedding):
        raise UsageError(
            "The head of this model is its embedding, so that both have one scheme.",
            f"Give embedding: {recipe.head} instead of head.",
        )
