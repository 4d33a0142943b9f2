"""Tasks: scores with intervals over examples, and against a reference a paired test over the same examples.

`needle` is made here (`needle.py`); every other name is one of the harness's (`lm_eval.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from miaotui.errors import DependencyError, MiaotuiError, UsageError
from miaotui.measure import intervals, needle
from miaotui.measure.scoring import Opened, Settings

NEEDLE = "needle"
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "bits_per_byte")
"""Of a task's metrics, the first of these that it has is its score; else the first that it names."""

Told = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Asked:
    """`limit` examples of each task at most; `shots` in the prompt, None: as the task has it; `folder` of own tasks."""

    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    folder: str | None = None
    chat: bool = False


def evaluate(
    model: str,
    asked: Asked,
    settings: Settings,
    reference: tuple[str, Settings] | None = None,
    tell: Told = _silent,
) -> dict[str, Any]:
    """The report that `miaotui evaluate --tasks … --json` prints.

    `{"model", "tasks": [{"task", "metric", "score", "score_stderr", "score_interval", "examples", …}], "settings"}`;
    with a reference each task also has its score and `difference` with its interval and p-value, of paired examples.
    Raises DependencyError without the harness, UsageError for a task that there is not.
    """
    mine = _scores(model, asked, settings, tell)
    report: dict[str, Any] = {"model": model, "settings": {**asdict(settings), **asdict(asked)}, "notes": []}
    if reference is None:
        return {**report, "tasks": [_figures(name, one) for name, one in mine.items()]}
    original, exact = reference
    theirs = _scores(original, asked, exact, tell)
    tasks = [{**_figures(name, one), **_against(one, theirs[name])} for name, one in mine.items()]
    return {**report, "tasks": tasks, "reference": {"model": original, "settings": asdict(exact)}}


@dataclass(frozen=True)
class Scored:
    """A task's metric for each of its examples, by number."""

    metric: str
    better: str
    values: Mapping[int, float]
    details: Sequence[Mapping[str, Any]] = ()


def _scores(model: str, asked: Asked, settings: Settings, tell: Told) -> dict[str, Scored]:
    found: dict[str, Scored] = {}
    names = [name for name in asked.names if name != NEEDLE]
    if NEEDLE in asked.names:
        results = needle.run(model, settings, tell)
        values = {at: float(one["found"]) for at, one in enumerate(results)}
        found[NEEDLE] = Scored("found", "higher", values, results)
    if names:
        found |= _by_harness(model, names, asked, settings, tell)
    return found


def _by_harness(model: str, names: Sequence[str], asked: Asked, settings: Settings, tell: Told) -> dict[str, Scored]:
    try:
        from miaotui.measure.lm_eval import EngineLM, harness
    except ImportError as error:
        hint = "Install it with pip install 'miaotui[eval]'; the task needle needs nothing."
        raise DependencyError(f"Tasks are run by lm-eval, which is not installed: {error}.", hint) from error
    Opened.of(model)  # what is wrong with the model is said as ever
    lm = EngineLM(model, settings, tell)
    try:
        report = harness(lm, names, limit=asked.limit, folder=asked.folder, shots=asked.shots, chat=asked.chat)
    except MiaotuiError:
        raise
    except (KeyError, ValueError) as error:
        if "not found" in str(error).lower() or isinstance(error, KeyError):
            raise UsageError(
                f"There is no task {', '.join(names)}: {_short(error)}", "`lm-eval ls tasks` lists them."
            ) from error
        raise MiaotuiError(f"lm-eval cannot run {', '.join(names)}: {_short(error)}", "Check the task.") from error
    except (OSError, RuntimeError) as error:
        hint = "Fetching its data set needs the network, once; needle needs none."
        raise MiaotuiError(f"lm-eval cannot run {', '.join(names)}: {_short(error)}", hint) from error
    finally:
        lm.close()
    return {name: _scored(report, name) for name in report["samples"]}


def _scored(report: Mapping[str, Any], name: str) -> Scored:
    """A task's preferred metric, for each example once, whatever filters there are."""
    samples = report["samples"][name]
    metrics = [str(metric) for metric in samples[0]["metrics"]]
    metric = next((one for one in PREFERRED if one in metrics), metrics[0])
    values: dict[int, float] = {}
    for sample in samples:
        value = sample[metric]
        if not isinstance(value, (int, float, np.number)):
            raise MiaotuiError(f"{name} has no score for single examples: {metric} is made of all.", "Leave it out.")
        values.setdefault(int(sample["doc_id"]), float(value))
    higher = report["higher_is_better"][name].get(metric, True)
    return Scored(metric, "higher" if higher else "lower", values)


# -- figures ---------------------------------------------------------------------------------------------
def _figures(name: str, one: Scored) -> dict[str, Any]:
    estimate = intervals.mean([np.array([value]) for value in one.values.values()])
    details = {"details": [dict(detail) for detail in one.details]} if one.details else {}
    return {
        "task": name, "metric": one.metric, "better": one.better, **estimate.report("score"),
        "examples": len(one.values), **details,
    }  # fmt: skip


def _against(one: Scored, other: Scored) -> dict[str, Any]:
    """The reference's score, and the paired difference."""
    shared = sorted(set(one.values) & set(other.values))
    differences = [np.array([one.values[at] - other.values[at]]) for at in shared]
    estimate = intervals.mean(differences)
    theirs = intervals.mean([np.array([value]) for value in other.values.values()])
    return {
        **theirs.report("reference_score"),
        **estimate.report("difference"),
        "p_value": intervals.paired_test(estimate, len(differences)),
    }


def _short(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200]}."
