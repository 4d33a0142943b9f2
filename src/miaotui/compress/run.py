"""`compress`: a model and a recipe in, an artefact out, verified; what was done before a kill is not done again."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.checkpoint.demo import cache_folder
from miaotui.checkpoint.write import atomic_file, atomic_folder
from miaotui.compress.calibrate import Statistics, calibrate, kept
from miaotui.compress.end_to_end import train
from miaotui.compress.methods.grid import check_width
from miaotui.compress.options import steps_of
from miaotui.compress.places import LINEARS, Model
from miaotui.compress.precision import device_of, resolved
from miaotui.compress.preflight import Estimate, estimate, measure, refuse
from miaotui.compress.progress import Progress, Tell, silent
from miaotui.compress.recipe import Recipe, parse_scheme
from miaotui.compress.sensitivity import budgeted
from miaotui.compress.solved import Part, Planned, Solved
from miaotui.compress.text.data import CalibrationText, Write, windows
from miaotui.compress.types import LinearScheme, Place
from miaotui.compress.walk import walk
from miaotui.compress.work import Work, check_tables, scale_type_of
from miaotui.compress.writing.folder import write_folder
from miaotui.compress.writing.folder_config import folder_config, target_of
from miaotui.compress.writing.gguf import check_gguf, write_gguf
from miaotui.compress.writing.verify import verify
from miaotui.errors import UsageError
from miaotui.model.chat import ChatTemplate, find_chat_templates
from miaotui.model.families import read_spec
from miaotui.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Report:
    """What was written. errors: by layer (−1: embedding and head) and linear, ‖ΔW·X‖² / ‖W·X‖² of the rounding.
    seconds: by stage. answer: what the artefact said to one prompt, where that was asked for. divergence: from the
    original, nats a token, `before` and `after` the scales were trained, on windows that were not trained on.
    """

    path: Path
    bytes: int
    source_bytes: int
    errors: dict[int, dict[str, float]]
    seconds: dict[str, float]
    estimate: Estimate
    calibration: dict[str, Any] | None
    answer: str | None = None
    divergence: dict[str, float] | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "path": str(self.path)}


def compress(
    model: str,
    recipe: Recipe,
    out: Path,
    *,
    cache: Path | None = None,
    device: str = "auto",
    write: Write | None = None,
    tell: Tell = silent,
    resume: bool = True,
    answer: Callable[[Path], str] | None = None,
) -> Report:
    """Write `out`: a compressed-tensors folder with recipe.yaml, or a GGUF file with `<name>.recipe.yaml` beside it.

    cache: where statistics lie that any recipe can use (default: in the product's cache). write: the model's own text
    (`data.Write`), for calibration by `self`. answer: asks the artefact one prompt. Solved layers lie in
    `.<name>.work` beside `out` until all is well; `resume` takes them up where they are of the same recipe.
    Raises UsageError and UnsupportedModelError for what cannot be, ResourceError where there is no room, all before
    any long work.
    """
    _check_output(out, recipe)
    checkpoint = open_checkpoint(resolve(model))
    source = Model(checkpoint, *read_spec(checkpoint))
    _check_recipe(source, recipe)
    cache = cache or cache_folder() / "calibration"
    clock = _Clock(tell)
    text = calibration_text(source, recipe, write) if recipe.calibrates else None
    unseen = _unseen(source, recipe, text, write)
    work = Work(
        source, recipe, out.parent / f".{out.name}.work", text, None,
        resolved(recipe.calibration.precision, device_of(device)), device_of(device),
    )  # fmt: skip
    with _alone(work.folder, resume):
        work = replace(work, statistics=_kept(work, cache))
        found = _preflight(work, cache, out, tell)
        clock.end("preflight")
        work = replace(work, statistics=_statistics(work, cache, tell))
        clock.end("calibrate")
        work = replace(work, schemes=budgeted(work, tell))
        clock.end("sensitivity")
        solved = walk(work, tell)
        clock.end("solve")
        divergence = None
        if unseen is not None:
            solved, divergence = train(replace(work, text=unseen), solved, tell)
            clock.end("train")
        _write(solved, recipe, out, _made_with(model, work), clock)
    shutil.rmtree(work.folder, ignore_errors=True)
    said = None if answer is None else answer(out)
    clock.end("answer")
    size = out.stat().st_size if out.is_file() else sum(file.stat().st_size for file in out.iterdir())
    errors = {part.layer: part.errors for part in solved.parts if part.errors}
    about = None if text is None else text.report()
    return Report(out, size, checkpoint.nbytes, errors, clock.seconds, found, about, said, divergence)


@dataclass
class _Clock:
    """Seconds of each stage."""

    tell: Tell

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


# -- before ----------------------------------------------------------------------------------------------------------
def _check_output(out: Path, recipe: Recipe) -> None:
    if recipe.format == "gguf" and out.suffix != ".gguf":
        raise UsageError(f"{out} is no name for a GGUF file.", "End it in .gguf.")
    if recipe.format != "gguf" and out.suffix == ".gguf":
        raise UsageError(f"{out} is to be a folder.", "Give --format gguf, or a name without .gguf.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already.", "Choose another output, or remove it first.")


def _check_recipe(model: Model, recipe: Recipe) -> None:
    """Everything that would stop the work later."""
    check_tables(recipe, steps_of(recipe, model.spec), model.spec)
    kind = scale_type_of(recipe, model)
    schemes: dict[Place, LinearScheme] = {}
    matched: set[str] = set()
    for place in model.places():
        if place.role not in LINEARS or place.bias:
            continue
        name = place.name(model.names).removesuffix(".weight")
        scheme = recipe.scheme_of(name, kind)
        schemes[place] = scheme
        matched |= recipe.overriding(name)
        width = model.stored(place).shape[-1]
        choices = () if recipe.budget is None else recipe.budget.choices
        for one in (scheme, *(parse_scheme(choice, kind) for choice in choices)):
            if one.weights is not None:
                check_width(width, one.weights, name)
    for override in recipe.overrides:
        if override.match not in matched:
            example = min(schemes).name(model.names).removesuffix(".weight")
            raise UsageError(
                f"The override {override.match!r:.100} matches no linear.", f"Linears are named like {example}."
            )
    for role, text in (("embedding", recipe.embedding), ("head", recipe.head)):
        scheme = parse_scheme(text, kind)
        if not scheme.kept:
            schemes[Place(role)] = scheme
            if scheme.weights is not None:
                check_width(model.spec.hidden_size, scheme.weights, f"The {role}")
    planned = Planned(model.checkpoint, model.spec, model.names, recipe.kv_cache, Path(), [Part(-1, schemes=schemes)])
    if recipe.format == "gguf":
        check_gguf(model.checkpoint, model.spec, model.names, schemes, recipe.kv_cache)
    else:
        folder_config(planned, target_of(planned))


def calibration_text(model: Model, recipe: Recipe, write: Write | None = None) -> CalibrationText:
    """The windows of a recipe, tokenised by the model's own tokenizer."""
    tokenizer = Tokenizer.from_checkpoint(model.checkpoint)
    has = find_chat_templates(model.checkpoint)
    template = ChatTemplate.from_checkpoint(model.checkpoint, tokenizer) if has else None
    return windows(tokenizer, recipe.calibration, chat_template=template, write=write)


def _unseen(model: Model, recipe: Recipe, text: CalibrationText | None, write: Write | None) -> CalibrationText | None:
    """The windows that scales are trained on, if they are: those of the same source that the rounding is not given."""
    trained = steps_of(recipe, model.spec).scales
    if trained is None or text is None:
        return None
    count = recipe.calibration.windows + trained.windows
    more = calibration_text(model, recipe.with_(calibration=replace(recipe.calibration, windows=count)), write)
    seen = {row.tobytes() for row in text.tokens}
    chosen = [i for i, row in enumerate(more.tokens) if row.tobytes() not in seen][: trained.windows]
    if not chosen:
        raise UsageError(
            "The calibration's text repeats itself: no window is left to train scales on.", "Give more text."
        )
    return replace(more, tokens=more.tokens[chosen])


@contextlib.contextmanager
def _alone(folder: Path, resume: bool) -> Iterator[None]:
    """The work folder, for one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another process is at work in {folder}.", "Wait for it, or end it.") from None
        if not resume:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        yield


def _preflight(work: Work, cache: Path, out: Path, tell: Tell) -> Estimate:
    gathers = work.recipe.needs_statistics and work.statistics is None
    found = estimate(work.model, work.recipe, gathers=gathers)
    refuse(found, work.model, cache, out)
    found = measure(work, found, gathers=gathers)
    tell(Progress("preflight", 1, 1, left=found.seconds, note=found.sentence()))
    return found


def _kept(work: Work, cache: Path) -> Statistics | None:
    if work.text is None or not work.recipe.needs_statistics:
        return None
    return kept(work.model, work.text, cache, precision=work.precision)


def _statistics(work: Work, cache: Path, tell: Tell) -> Statistics | None:
    if work.text is None or not work.recipe.needs_statistics:
        return None
    return calibrate(work.model, work.text, cache, precision=work.precision, device=work.device, tell=tell)


# -- after -----------------------------------------------------------------------------------------------------------
def _made_with(model: str, work: Work) -> dict[str, Any]:
    """Versions and fingerprints, for people: with these the recipe gives the same bits."""
    made = {
        "miaotui": version("miaotui"),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "model": model,
        "model_fingerprint": work.model.checkpoint.fingerprint(),
        "precision": work.precision,
    }
    return made if work.text is None else {**made, "calibration": work.text.report()}


def _write(solved: Solved, recipe: Recipe, out: Path, made_with: dict[str, Any], clock: _Clock) -> None:
    """The artefact appears once it was read back and is what was meant."""
    layers = len(solved.spec.layers)
    clock.tell(Progress("write", 0, layers))
    text = recipe.yaml(made_with)
    if recipe.format == "gguf":
        partial = out.with_name(f".{out.stem}.partial.gguf")
        try:
            write_gguf(solved, partial, recipe_yaml=text)
            clock.end("write")
            clock.tell(Progress("verify", 0, layers))
            verify(solved, partial)
            with atomic_file(out.with_name(f"{out.name}.recipe.yaml")) as file:
                file.write(text.encode())
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    else:
        with atomic_folder(out) as folder:
            write_folder(solved, folder)
            (folder / "recipe.yaml").write_text(text, encoding="utf-8")
            clock.end("write")
            clock.tell(Progress("verify", 0, layers))
            verify(solved, folder)
    clock.end("verify")
