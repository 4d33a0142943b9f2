"""Settings of every step, read from a recipe before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from miaotui.compress.methods.awq import AwqOptions
from miaotui.compress.methods.gptq import GptqOptions
from miaotui.compress.methods.grid import Fit, Minimum
from miaotui.compress.methods.hqq import HqqOptions
from miaotui.compress.methods.qat import QatOptions
from miaotui.compress.methods.scales import ScalesOptions
from miaotui.compress.recipe import Recipe, from_plain
from miaotui.errors import UsageError
from miaotui.model.spec import ModelSpec


@dataclass(frozen=True)
class RtnOptions:
    """fit: `minmax`, each group's own range; `mse`, the least error of the weight; `output`, of what it puts out.

    None: `output` after awq, which searches ranges in the same way (section 3.2 there), else `minmax`.
    """

    fit: Fit | None = None


@dataclass(frozen=True)
class RotateOptions:
    """r1: rotate the residual stream; r2: the heads' values. seed: of the signs."""

    r1: bool = True
    r2: bool = True
    seed: int = 0


@dataclass(frozen=True)
class SmoothOptions:
    """strength: SmoothQuant's α, how much of an outlier goes over to the weights. everywhere: before the output and
    down projections too, and not only after norms.
    """

    strength: float = 0.5
    everywhere: bool = False


@dataclass(frozen=True)
class NoOptions:
    """fp8 has none."""


_KINDS: dict[str, type[Any]] = {
    "rtn": RtnOptions, "gptq": GptqOptions, "hqq": HqqOptions, "fp8": NoOptions, "rotate": RotateOptions,
    "smooth": SmoothOptions, "awq": AwqOptions, "qat": QatOptions,
    "scales": ScalesOptions,
}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """A recipe's steps with their settings; None where the recipe does without."""

    rounder: str
    rtn: RtnOptions
    gptq: GptqOptions
    hqq: HqqOptions
    rotate: RotateOptions | None
    smooth: SmoothOptions | None
    awq: AwqOptions | None
    qat: QatOptions | None
    scales: ScalesOptions | None
    minimum: Minimum


def steps_of(recipe: Recipe, spec: ModelSpec) -> Steps:
    """Every setting, checked. Raises UsageError for an unknown one, and for steps that this model cannot have."""

    def read(step: str) -> Any:
        return from_plain(_KINDS[step], recipe.options.get(step, {}), f"options.{step}.")

    def chosen(step: str) -> Any:
        return read(step) if step in recipe.steps else None

    rtn: RtnOptions = read("rtn")
    rtn = replace(rtn, fit=rtn.fit or ("output" if "awq" in recipe.steps else "minmax"))
    minimum: Minimum = "free" if recipe.format == "gguf" else "zero_point"
    steps = Steps(
        recipe.rounder, rtn, read("gptq"), read("hqq"), chosen("rotate"), chosen("smooth"), chosen("awq"),
        chosen("qat"), chosen("scales"), minimum,
    )  # fmt: skip
    _check(recipe, steps, spec)
    return steps


def _check(recipe: Recipe, steps: Steps, spec: ModelSpec) -> None:
    if steps.scales is not None and steps.rounder == "fp8":
        raise UsageError("The scales of fp8 weights are not trained.", "Leave scales out of the method.")
    rotated = steps.rotate
    if rotated is not None and rotated.r1 and not (spec.norm_kind == "rms" and spec.pre_norm and not spec.post_norm):
        raise UsageError(
            f"The residual stream of {spec.family} cannot be rotated: its norms do not commute with a rotation.",
            "Give options: {rotate: {r1: false}}, or leave rotate out.",
        )
    if rotated is not None and not recipe.propagate and _needs_ranges(recipe, steps):
        raise UsageError(
            "After a rotation the ranges of activations are not known from the original's.",
            "Set propagate: true, which measures them again.",
        )
    if not spec.pre_norm and (steps.smooth is not None or steps.awq is not None):
        raise UsageError(
            f"{spec.family} has no norms before its linears that could take up a scale.",
            "Leave smooth and awq out of the method.",
        )


def _needs_ranges(recipe: Recipe, steps: Steps) -> bool:
    return steps.smooth is not None or recipe.kv_cache != "none" or recipe.has_static_inputs
