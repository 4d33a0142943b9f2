"""`accelerate`: a model and a floor in, the fastest artefact within it out, with a card; or the original, and why.

Everything on the way lies in `.<name>.search` beside the output. A search that was stopped, in whatever way, goes on
there when the same command is given again; once the artefact stands, the folder is removed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaotui.accelerate import texts
from miaotui.accelerate.against import Against
from miaotui.accelerate.card.publish import publish
from miaotui.accelerate.card.schema import Card, Energies, Model, Peer, Sensitivity
from miaotui.accelerate.compose import Findings, compose, model_of
from miaotui.accelerate.explain import techniques, verdict
from miaotui.accelerate.goals import fitted
from miaotui.accelerate.search.attempt import Attempt, Plan
from miaotui.accelerate.search.finish import Finish, Measured
from miaotui.accelerate.search.journal import Journal
from miaotui.accelerate.search.ledger import Ledger, once
from miaotui.accelerate.search.predict import Predictor
from miaotui.accelerate.search.sample import Sampler
from miaotui.accelerate.search.search import Outcome, search
from miaotui.accelerate.search.space import LOOKED_AT, Candidate, make_space
from miaotui.accelerate.search.workshop import Builder, RealWorkshop, Subject, settings_of
from miaotui.accelerate.source import Source, examine, origin
from miaotui.accelerate.texts import Texts
from miaotui.checkpoint import serving
from miaotui.checkpoint.demo import cache_folder
from miaotui.compress.recipe import Calibration
from miaotui.errors import DependencyError, InterruptedWorkError, MiaotuiError, UsageError
from miaotui.hardware import ceilings, detect
from miaotui.hardware.ceilings import Ceilings, Probes
from miaotui.measure import quality
from miaotui.measure.quality_data import Cut
from miaotui.measure.scoring import Opened

if TYPE_CHECKING:
    from miaotui.compress.text.packing import Write

SEARCH_SHARE = 0.65
"""Of the budget; the rest is for the last measurements."""
ROUND_SHARE = 1 / 60
"""Of the budget, for one round of what the original is timed by."""
SENSITIVITY_SHARE = 0.06
"""Of the budget, for what each layer costs."""
SLOWNESS = 8.0
"""How far PyTorch is from the peak there, as a rule."""
FORMAT = 1
"""Of the journal's actions."""
WINDOWS = ((600.0, 64), (300.0, 32), (0.0, 16))
"""From a budget of so many seconds on, so many windows to calibrate on."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked for. `data` to measure on and `calibration` to calibrate on as in `texts.prepare`."""

    model: str
    out: Path
    plan: Plan
    data: str | None = None
    calibration: str | None = None
    against: tuple[str, ...] = ()
    """Peers to measure too, beyond the budget."""
    tasks: tuple[str, ...] = ()
    """Tasks to score too, of original and winner, beyond the budget; as `measure.tasks` names them."""
    task_limit: int | None = None
    command: str = ""
    """The command line that asks for this."""

    @property
    def work(self) -> Path:
        return self.out.parent / f".{self.out.name}.search"


def accelerate(
    request: Request,
    probes: Probes,
    *,
    restart: bool = False,
    write: Write | None = None,
    tell: Tell = lambda line: None,
) -> Card:
    """Search, build, measure, and leave `request.out` as a folder with the winner (none where the original is kept)
    and its card. `write` is the model's own text, for calibration by `self`.

    Raises UsageError for an output that is there already and for text that cannot be used, DependencyError where
    PyTorch or Optuna are missing, and whatever opening the model raises.
    """
    _check(request)
    opened = Opened.of(request.model)
    source = examine(opened.checkpoint, LOOKED_AT)
    text = texts.prepare(request.data, request.calibration, cache_folder() / "texts")
    subject = Subject(request.model, opened, text)
    with Journal(request.work / "journal", _belongs_to(request, subject), restart=restart) as journal:
        if not journal.entries:
            _clear(request.work)
        try:
            card = _Run(request, subject, source, probes, journal, write, tell).card()
        except KeyboardInterrupt:
            hint = "Give the same command again to go on, or remove that folder."
            raise InterruptedWorkError(f"The search was stopped; what it found is in {request.work}.", hint) from None
    shutil.rmtree(request.work, ignore_errors=True)
    return card


class _Run:
    """One search, from its journal's state to the card."""

    def __init__(
        self,
        request: Request,
        subject: Subject,
        source: Source,
        probes: Probes,
        journal: Journal,
        write: Write | None,
        tell: Tell,
    ) -> None:
        self.request, self.subject, self.source, self.probes, self.tell = request, subject, source, probes, tell
        self.plan = Plan(request.plan.goal, request.plan.floor, SEARCH_SHARE * request.plan.budget, request.plan.seed)
        limits = _limits_in(journal, source, probes, tell)
        most = ROUND_SHARE * request.plan.budget
        longest = source.spec.max_position
        load = fitted(lambda load: 2 * Predictor(source, limits, load).round_seconds(self.plan.goal), most, longest)
        self.predictor = Predictor(source, limits, load)
        self.builder = Builder(request.model, request.work / "cut", tell, write)
        self.workshop = RealWorkshop(subject, self.plan, load, request.work, self.builder)
        self.ledger = Ledger(journal, self.workshop)
        self.notes: list[str] = []
        """Caveats that came up on the way."""
        self.calibration = calibration_of(request.plan, subject.texts)
        self.space = make_space(source, self.plan.goal, detect.detect(), self.calibration, request.plan.budget)

    def card(self) -> Card:
        """Search and measure; leaves the artefact."""
        try:
            outcome = self._searched()
            self.workshop.rest()
            winner = outcome.winner
            path = self._artefact(winner)
            measured = self._measured(outcome, path)
            report = self._quality(winner)
        finally:
            self.workshop.rest()
        costs = self._sensitivity(winner, path)
        tasks = self._tasks(winner, path)
        peers = self._peers(winner, path)
        found = Findings(
            model=self._model(),
            source=self.source,
            outcome=self._whole(outcome),
            load=self.predictor.load,
            measured=measured,
            quality=report,
            energy=Energies.of(measured.speeds),
            techniques=techniques(outcome, self.space),
            verdict=verdict(outcome),
            artefact=self.request.out.name,
            commands=self._commands(winner),
            calibration=asdict(self.calibration),
            peers=peers,
            sensitivity=costs,
            tasks=tasks,
            caveats=(
                *self.notes,
                f"Quality was measured on {self.subject.texts.name}; on other text it may differ.",
            ),
        )
        card = compose(found)
        self._publish(card, winner)
        return card

    def _searched(self) -> Outcome:
        return search(self.plan, self.space, self.ledger, self._gain, Sampler(self.plan.seed), self.tell)

    def _gain(self, candidate: Candidate) -> float:
        return self.predictor.gain(self.plan.goal, candidate)

    def _artefact(self, winner: Attempt | None) -> str:
        """What to load for the winner."""
        if winner is None or winner.candidate.recipe is None:
            return self.request.model
        path = self.workshop.path(winner.candidate)
        if not path.exists():
            self.workshop.build(winner.candidate)
        return str(path)

    def _measured(self, outcome: Outcome, path: str) -> Measured:
        self.tell("measuring both in full")
        finish = Finish(self.ledger, self.predictor, self.probes, self.plan.goal, self.tell)
        candidate = None if outcome.winner is None else outcome.winner.candidate
        left = self.request.plan.budget - self.ledger.spent
        return finish.measure(self.request.model, candidate, path, 0.8 * left)

    def _quality(self, winner: Attempt | None) -> Mapping[str, Any]:
        """The report that confirmed the winner; else the original's own."""
        if winner is not None:
            assert winner.confirmation is not None
            return winner.confirmation.quality
        self.tell("measuring the original's quality")
        cut = Cut(min(1024, self.source.spec.max_position), None, 16)
        settings = settings_of(Candidate(None).serving)
        data = str(self.subject.texts.confirm)
        return self.ledger.note(
            "quality original", lambda: quality.evaluate(self.request.model, data, cut=cut, settings=settings)
        )

    def _sensitivity(self, winner: Attempt | None, path: str) -> tuple[Sensitivity, ...]:
        """What each layer's linears cost, or where there is no time for that, what each layer costs; else nothing."""
        recipe = None if winner is None else winner.candidate.recipe
        if recipe is None or winner is None or winner.candidate.blocks is not None:
            return ()
        from miaotui.accelerate.search import sensitivity

        most = SENSITIVITY_SHARE * self.request.plan.budget * self.predictor.limits.fp32 / SLOWNESS
        choices = (sensitivity.roles_of(recipe.method), (sensitivity.ALL,))
        fitting = [one for one in choices if sensitivity.operations(self.source.spec, len(one)) <= most]
        if not fitting:
            return ()
        roles = fitting[0]
        self.tell("measuring what each layer costs")
        tokens = self.workshop.tokens
        found = self.ledger.note(
            f"sensitivity {winner.candidate.weights_key} {','.join(roles)}",
            lambda: {"costs": [asdict(one) for one in sensitivity.measure(self.request.model, path, tokens, roles)]},
        )
        scheme = winner.candidate.features()["scheme"]
        return tuple(Sensitivity(one["layer"], one["role"], scheme, one["kl"]) for one in found["costs"])

    def _tasks(self, winner: Attempt | None, path: str) -> Mapping[str, Any] | None:
        """The report on the tasks that were asked for, against the original where there is a winner."""
        from miaotui.measure.tasks import Asked, evaluate

        if not self.request.tasks:
            return None
        self.tell("scoring tasks")
        asked = Asked(self.request.tasks, self.request.task_limit)
        candidate = Candidate(None) if winner is None else winner.candidate
        action = f"tasks {candidate.answers_key} {','.join(asked.names)} {asked.limit}"
        against = None if winner is None else (self.request.model, quality.EXACT)
        settings = settings_of(candidate.serving)
        try:
            return self.ledger.note(action, lambda: evaluate(path, asked, settings, against))
        except MiaotuiError as error:
            self.notes.append(f"The tasks were not scored: {error.message}")
            return None

    def _peers(self, winner: Attempt | None, path: str) -> tuple[Peer, ...]:
        options = {} if winner is None else replace(winner.candidate.serving, speculative=None).options()
        against = Against(
            self.request.model, path, options, self.source, self.predictor.limits, self.request.work / "peers",
            self.ledger, self.builder, self.tell,
        )  # fmt: skip
        return against.measure(self.request.against)

    def _model(self) -> Model:
        checkpoint = self.subject.opened.checkpoint
        return model_of(self.request.model, self.source, checkpoint.fingerprint(), origin(checkpoint))

    def _whole(self, outcome: Outcome) -> Outcome:
        """With the budget that was asked for, and all that was spent."""
        plan = self.request.plan
        return Outcome(plan, outcome.winner, outcome.attempts, outcome.skipped, self.ledger.spent, outcome.notes)

    def _commands(self, winner: Attempt | None) -> tuple[str, ...]:
        """To do it all again, with the kernels of this run where the environment named them."""
        isa = os.environ.get("MIAOTUI_ISA")
        named = f"MIAOTUI_ISA={isa} " if isa else ""
        return tuple(named + command for command in self._bare_commands(winner))

    def _bare_commands(self, winner: Attempt | None) -> tuple[str, ...]:
        out, confirm = self.request.out, self.subject.texts.confirm
        again = [self.request.command] if self.request.command else []
        if winner is None:
            return (*again, f"miaotui bench {self.request.model}")
        serving_ = winner.candidate.serving
        flags = "".join(
            f" --{name.replace('_', '-')} {value}"
            for name, value in serving_.options().items()
            if name in ("compute", "kv_cache_dtype", "threads")
        )
        return (
            *again,
            f"miaotui bench {out}{' --speculative none' if serving_.speculative else ''}",
            f"miaotui evaluate {out} --data {confirm} --reference {self.request.model}{flags}",
        )

    def _publish(self, card: Card, winner: Attempt | None) -> None:
        """The output appears with its card, whole or not at all."""
        folder = self._folder(winner)
        if winner is not None:
            serving.write(folder, winner.candidate.serving.options(), detect.usable_cores())
        publish(card, folder)
        self.request.out.parent.mkdir(parents=True, exist_ok=True)
        if self.request.out.exists():
            self.request.out.rmdir()  # `_check` has seen that it is empty
        os.replace(folder, self.request.out)

    def _folder(self, winner: Attempt | None) -> Path:
        """The folder that becomes the output, on its own file system."""
        if winner is not None and winner.candidate.recipe is not None:
            path = self.workshop.path(winner.candidate)
            return path.parent if path.suffix == ".gguf" else path
        folder = self.request.work / "output"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if winner is not None:
            _copy_weights(self.subject.opened.checkpoint.path, folder)
        return folder


# -- before ----------------------------------------------------------------------------------------------
def _check(request: Request) -> None:
    """Everything that would stop the work later."""
    out = request.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already.", "Choose another output, or remove it first.")
    if out.suffix.lower() == ".gguf":
        raise UsageError(f"{out} is to be a folder: the card and the weights lie in it.", "Leave .gguf out.")
    needed = [("torch", "PyTorch", "accelerate"), ("optuna", "Optuna", "accelerate")]
    if any(name != "needle" for name in request.tasks):
        needed.append(("lm_eval", "lm-eval", "eval"))
    for module, what, extra in needed:
        if importlib.util.find_spec(module) is None:
            raise DependencyError(f"{what} is not installed.", f"Install it with pip install 'miaotui[{extra}]'.")


def _clear(work: Path) -> None:
    """What lies beside a journal that has nothing to tell belongs to another search."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _belongs_to(request: Request, subject: Subject) -> dict[str, Any]:
    """What a journal's results depend on."""
    return {
        "format": FORMAT,
        "model": subject.opened.checkpoint.fingerprint(),
        **asdict(request.plan),
        "data": subject.texts.choose.parent.name,
        "calibration": request.calibration,
        "machine": detect.detect().fingerprint(),
    }


def _limits_in(journal: Journal, source: Source, probes: Probes, tell: Tell) -> Ceilings:
    """The machine's ceilings as they were when the search began: what is tried depends on them."""

    def measure() -> dict[str, Any]:
        tell("measuring this machine's ceilings")
        working_set = ceilings.within(source.step_bytes, detect.available_memory())
        return asdict(ceilings.measure(probes, detect.usable_cores(), working_set))

    return Ceilings(**once(journal, "ceilings", measure))


def calibration_of(plan: Plan, text: Texts) -> Calibration:
    """As much of the text as the budget allows."""
    windows = next(count for least, count in WINDOWS if plan.budget >= least)
    return Calibration(source=text.calibrate, windows=windows, seed=plan.seed)


def _copy_weights(path: Path, folder: Path) -> None:
    """The original's files, so that the output is whole where only the serving changed."""
    alone = path.is_file() and path.suffix != ".safetensors"
    for file in [path] if alone else (path if path.is_dir() else path.parent).iterdir():
        if file.is_file():
            shutil.copy2(file, folder / file.name)
