"""`miaotui distill`: a student, its teacher, texts, and where the trained model goes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.files import read_json
from miaotui.checkpoint.write import atomic_folder, write_json
from miaotui.compress.precision import resolved
from miaotui.compress.train.assets import TextFiles
from miaotui.compress.train.corpus import Corpus, Texts
from miaotui.compress.train.folder import dense_config
from miaotui.compress.train.group import Group, joined
from miaotui.compress.train.journal import Journal
from miaotui.compress.train.loop import Trainer
from miaotui.compress.train.objective import Objective
from miaotui.compress.train.on_policy import OnPolicy, Write
from miaotui.compress.train.privacy import Private
from miaotui.compress.train.settings import Precision, Settings, plain
from miaotui.compress.train.state import Store
from miaotui.compress.train.student import Lora, Student, shape_config
from miaotui.compress.train.teacher import Teacher
from miaotui.errors import ResourceError, UsageError
from miaotui.model.chat import ChatTemplate, find_chat_templates
from miaotui.model.tokenizer import Tokenizer
from miaotui.quant.tensor import DenseType


@dataclass(frozen=True)
class Request:
    """teacher: MODEL, or None to learn from the text alone. student: MODEL, a config.json, or a shape as
    `layers=4,hidden=256`, changes of the teacher's own; the latter two begin with random weights.

    tokenizer: folder with the new student's tokenizer.json, where there is no teacher (None: beside its config.json).
    scheme: train linears as these codes. dtype: of the written weights (None: as the student had them).
    """

    student: str
    teacher: str | None = None
    tokenizer: str | None = None
    scheme: str | None = None
    lora: Lora | None = None
    dtype: DenseType | None = None


def distil(
    request: Request,
    out: Path,
    settings: Settings,
    *,
    write: Write | None = None,
    say: Callable[[str], None] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a student and write it to the folder `out`, with the report that is given back as `training.json`.

    `<out>.training` holds checkpoints, from which the same call goes on, and TensorBoard's files; the latter stay.
    write: how the student writes, for on-policy windows. say: told a line now and then; tell: (steps done, in all).
    Raises UsageError for what does not fit together, MiaotuiError for a training that cannot be held.
    """
    if request.teacher is None:
        settings = replace(settings, terms=replace(settings.terms, ce=settings.terms.ce or 1.0, kl=0.0, hidden=0.0))
    _check(request, out, settings, write)
    product = product_type(settings.precision, settings.device)
    with joined() as group:
        teacher = None if request.teacher is None else Teacher.of(request.teacher, product, settings.device)
        student = student_of(request, teacher, settings)
        work = out.with_name(out.name + ".training")
        work.mkdir(parents=True, exist_ok=True)
        corpora = _corpora(student.source, settings, work, group)
        objective = Objective(student, teacher, settings.terms, product, settings.recompute, settings.seed)
        run = plain(settings) | _identity(request, student, teacher, corpora)
        trainer = Trainer(
            objective,
            corpora,
            settings,
            Store(work, run),
            lambda step: Journal(work / "logs", say or (lambda line: None), first=group.first, step=step),
            group=group,
            on_policy=OnPolicy(write, corpora, work, settings.seed) if write and settings.on_policy else None,
            private=_private(settings, corpora, group.size),
            tell=tell if group.first else None,
        )
        trainer.train()
        report = _report(request, settings, trainer, product)
        if group.first:
            kind = request.dtype or _stated(student)
            with atomic_folder(out) as building:
                student.write_into(building, kind)
                write_json(building / "training.json", report)
            _tidy(work)
        group.wait()
    return report


# -- what is asked for -----------------------------------------------------------------------------------------
def _check(request: Request, out: Path, settings: Settings, write: Write | None) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already.", "Choose another output folder, or remove it first.")
    if settings.on_policy and (write is None or request.teacher is None):
        raise UsageError("On-policy windows need a teacher to judge them.", "Give a teacher, or leave out --on-policy.")
    if request.teacher is not None and not settings.terms.taught:
        raise UsageError("The teacher has no say in the loss.", "Give --kl or --hidden a weight.")
    if request.tokenizer is not None and (request.teacher is not None or not request.student.endswith(".json")):
        raise UsageError("The tokenizer is given twice.", "Give --tokenizer only with a config.json and no teacher.")


_SHAPE = re.compile(r"\s*(\w+)\s*=\s*(\d{1,9})\s*")


def student_of(request: Request, teacher: Teacher | None, settings: Settings) -> Student:
    """The student as it begins. Raises UsageError where teacher and student do not go together."""
    text, device = request.student, settings.device
    shape = [_SHAPE.fullmatch(part) for part in text.split(",")]
    if all(shape):
        if teacher is None:
            raise UsageError("A shape is a change of a teacher's.", "Give a config.json, or a teacher.")
        config = shape_config(dense_config(teacher.source, teacher.spec), {m[1]: int(m[2]) for m in shape if m})
        student = Student.new(config, teacher.source, settings.seed, device)
    elif text.endswith(".json"):
        path = Path(text).expanduser()
        source = TextFiles(Path(request.tokenizer or path.parent).expanduser()) if teacher is None else teacher.source
        student = Student.new(read_json(path), source, settings.seed, device)
    else:
        student = Student.of(text, device)
    if teacher is not None:
        teacher.check(student)
    _check_window(settings, student, teacher)
    if request.scheme is not None:
        student.code(request.scheme)
    if request.lora is not None:
        student.adapt(request.lora, settings.seed)
    return student


def _check_window(settings: Settings, student: Student, teacher: Teacher | None) -> None:
    longest = min(
        student.spec.max_position, student.spec.max_position if teacher is None else teacher.spec.max_position
    )
    if settings.window > longest:
        raise UsageError(
            f"A window of {settings.window} tokens is longer than the {longest} that the models know places for.",
            f"Give --window at most {longest}.",
        )


def product_type(precision: Precision, device: str) -> torch.dtype:
    """The type that matrices are multiplied in: bfloat16 where the machine does so itself (AVX-512-BF16, AMX, a GPU).

    Weights, their moments, norms, the residual stream and the loss stay float32. Raises ResourceError for a GPU that
    is not there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ResourceError(f"There is no {device} that PyTorch can use.", "Leave out --device.")
    return torch.bfloat16 if resolved(precision, device) == "bf16" else torch.float32


def _corpora(source: Checkpoint, settings: Settings, work: Path, group: Group) -> list[Corpus]:
    """Every task's windows. All processes read the same; the first one's files stay."""
    tokenizer = Tokenizer.from_checkpoint(source)
    template = ChatTemplate.from_checkpoint(source, tokenizer) if find_chat_templates(source) else None
    texts = Texts(tokenizer, template, settings.window)
    found = []
    for number, task in enumerate(settings.tasks):
        file = work / f"windows-{number}.{group.rank}.bin"
        found.append(texts.corpus(task.source, file, settings.held_out, settings.seed))
    return found


def _identity(request: Request, student: Student, teacher: Teacher | None, corpora: list[Corpus]) -> dict[str, object]:
    """What a run has to have in common with another to go on from its checkpoints, beside its settings."""
    return {
        "student": request.student,
        "student's files": student.source.fingerprint(),
        "teacher": request.teacher,
        "teacher's files": None if teacher is None else teacher.source.fingerprint(),
        "text": [corpus.fingerprint for corpus in corpora],
        "scheme": request.scheme,
        "LoRA": None if request.lora is None else json.loads(json.dumps(asdict(request.lora))),
    }


def _private(settings: Settings, corpora: list[Corpus], processes: int) -> Private | None:
    if settings.privacy is None:
        return None
    if processes > 1:
        raise UsageError("Private training is accounted for in one process.", "Start it without torchrun.")
    return Private(
        settings.privacy,
        steps=settings.steps,
        batch=settings.batch,
        windows=len(corpora[0].train),
        clip=settings.clip,
        seed=settings.seed,
        device=settings.device,
    )


# -- what became of it -------------------------------------------------------------------------------------------
def _stated(student: Student) -> DenseType:
    """The type that the student's configuration names."""
    stated = str(student.config.get("dtype") or student.config.get("torch_dtype") or "")
    kinds: dict[str, DenseType] = {"float16": "float16", "float32": "float32"}
    return kinds.get(stated, "bfloat16")


def _report(request: Request, settings: Settings, trainer: Trainer, product: torch.dtype) -> dict[str, Any]:
    progress, judged = trainer.progress, trainer.judgements
    tokens = progress.step * settings.batch * settings.window
    best = trainer.pace.best_step if trainer.best is not None else None
    return {
        "teacher": request.teacher,
        "student": request.student,
        "parameters": trainer.student.size(),
        "steps": progress.step,
        "stopped_early": progress.step < settings.steps,
        "rollbacks": progress.rollbacks,
        "tokens": tokens,
        "seconds": round(progress.seconds, 2),
        "tokens_per_second": round(tokens / max(progress.seconds, 1e-9), 1),
        "product": str(product).removeprefix("torch."),
        "best_step": best,
        "held_out": [asdict(judgement) for judgement in judged],
        "text": [corpus.report() for corpus in trainer.corpora],
        "privacy": None if trainer.private is None else trainer.private.report(),
        "settings": plain(settings),
    }


def _tidy(work: Path) -> None:
    """Remove what only a training that is not finished needs."""
    for path in work.iterdir():
        if path.name == "logs":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
