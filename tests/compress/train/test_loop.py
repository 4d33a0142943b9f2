"""The trainer: it learns, goes on to the bit after a kill, comes back from explosions, and stops when it is time."""

from __future__ import annotations

import json
import math
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miaotui.compress.train import batches, objective
from miaotui.compress.train.schedule import FLOOR, Pace
from miaotui.compress.train.settings import Settings, Task, Terms
from miaotui.compress.train.student import Student
from miaotui.errors import MiaotuiError, UsageError
from tests.compress.train.making import tiny
from tests.compress.train.running import SMALL, go, write_text


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings_of(tmp_path: Path, **changes: object) -> Settings:
    return replace(SMALL, tasks=(Task(str(write_text(tmp_path / "text.txt"))),), **changes)  # type: ignore[arg-type]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# -- learning ----------------------------------------------------------------------------------------------------
def test_a_student_learns_and_is_written_with_what_it_took(tmp_path: Path) -> None:
    lines: list[str] = []
    report = go(tmp_path, settings_of(tmp_path, steps=40, evaluate_every=10), say=lines.append)
    losses = [judged["loss"] for judged in report["held_out"]]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == report
    assert (report["steps"], report["tokens"], report["rollbacks"]) == (40, 40 * 6 * 16, 0)
    assert any("step 40/40" in line for line in lines)
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["logs"]
    assert Student.of(str(tmp_path / "out")).forward(torch.tensor([[1, 2, 3]])).shape == (1, 3, 258)


def test_without_a_teacher_it_learns_the_text(tmp_path: Path) -> None:
    from miaotui.compress.train.distil import Request, distil

    tiny.folder(tmp_path / "t")
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(num_hidden_layers=1)))
    tiny.write_tokenizer(tmp_path)
    settings = settings_of(tmp_path, steps=30, evaluate_every=10, rate=2e-2, terms=Terms(ce=1.0, kl=0.0))
    report = distil(Request(str(tmp_path / "config.json")), tmp_path / "out", settings)
    first, last = report["held_out"][0], report["held_out"][-1]
    assert first["cross_entropy"] == pytest.approx(math.log(258), rel=0.05)
    assert last["cross_entropy"] < 3.2
    assert last["loss"] == pytest.approx(last["cross_entropy"])


def test_the_best_weights_are_kept_and_patience_ends_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, steps=60, evaluate_every=3, patience=2, rate=0.5, warmup=0, clip=100.0)
    report = go(tmp_path, settings)
    losses = {judged["step"]: judged["loss"] for judged in report["held_out"]}
    assert report["stopped_early"]
    assert report["steps"] < 60
    assert report["best_step"] == min(losses, key=losses.__getitem__)
    if report["best_step"] == 0:
        before = Student.of(str(tmp_path / "student")).values
        after = Student.of(str(tmp_path / "out")).values
        assert all(torch.equal(before[place], after[place]) for place in before)


# -- interruptions -----------------------------------------------------------------------------------------------
def test_after_a_kill_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    go_whole = go(whole)
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "tests.compress.train.running", str(killed), "0.34"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 7:
                process.send_signal(signal.SIGKILL)
                break
    assert not (killed / "out").exists()
    lines: list[str] = []
    report = go(killed, say=lines.append)
    assert lines[0] == "going on from step 6"
    assert report["held_out"] == go_whole["held_out"]
    one, other = weights_of(whole / "out"), weights_of(killed / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    settings = settings_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, settings, tell=stop)
    with pytest.raises(UsageError, match=r"another run, whose rate was 0\.005"):
        go(tmp_path, replace(settings, rate=1e-3))


# -- explosions --------------------------------------------------------------------------------------------------
class _Exploding:
    """Makes the loss of some steps no number, or enormous, whatever the weights are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: set[int], value: float = math.nan) -> None:
        self.calls, self.value, self.count = calls, value, 0
        self.learn = objective.Objective.learn
        monkeypatch.setattr(objective.Objective, "learn", lambda *given: self.told(*given))

    def told(self, *given: object) -> dict[str, float]:
        self.count += 1
        sums = self.learn(*given)  # type: ignore[arg-type]
        return {name: value * self.value if self.count in self.calls else value for name, value in sums.items()}


@pytest.mark.parametrize(("value", "said"), [(math.nan, "no number"), (1e6, "exploded")])
def test_an_explosion_goes_back_with_a_smaller_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, said: str
) -> None:
    _Exploding(monkeypatch, {14}, value)
    lines: list[str] = []
    report = go(tmp_path, settings_of(tmp_path, steps=18), say=lines.append)
    assert report["rollbacks"] == 1
    assert report["steps"] == 18
    told = next(line for line in lines if "back to step" in line)
    assert said in told
    assert "step 14" in told
    assert "back to step 12 with 0.5 times the rate (1 of 3)" in told


def test_the_rate_is_smaller_afterwards_and_the_batches_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    seen: list[bytes] = []
    step, following = torch.optim.AdamW.step, batches.Batches.next

    def noted(self: torch.optim.AdamW, *given: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *given)  # type: ignore[arg-type]

    def read(self: batches.Batches, *given: object) -> objective.Windows:
        found = following(self, *given)  # type: ignore[arg-type]
        seen.append(found.tokens.numpy().tobytes())
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    monkeypatch.setattr(batches.Batches, "next", read)
    _Exploding(monkeypatch, {5})
    go(tmp_path, settings_of(tmp_path, schedule="plateau", warmup=0, steps=6))
    assert rates == [5e-3] * 4 + [2.5e-3] * 3  # steps 1 to 4, then 4 to 6 again from the checkpoint of step 3
    assert len(set(seen)) == len(seen)


def test_it_gives_up_after_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Exploding(monkeypatch, set(range(5, 100)))
    lines: list[str] = []
    with pytest.raises(MiaotuiError, match="after 3 returns to a checkpoint") as raised:
        go(tmp_path, settings_of(tmp_path), say=lines.append)
    assert sum("back to step" in line for line in lines) == 3
    assert "--rate" in raised.value.hint
    assert not (tmp_path / "out").exists()


# -- the rate ----------------------------------------------------------------------------------------------------
def test_warm_up_then_a_cosine() -> None:
    pace, settings = Pace(), replace(SMALL, steps=100, warmup=10, rate=1.0)
    rates = [pace.rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx((1 + FLOOR) / 2)
    assert rates[99] == pytest.approx(FLOOR, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_plateau_halves_the_rate() -> None:
    pace, settings = Pace(), replace(SMALL, schedule="plateau", warmup=0, rate=1.0)
    assert [pace.judge(loss, i, settings) for i, loss in enumerate((3.0, 2.0, 2.0, 2.1))] == [True, True, False, False]
    assert pace.rate(50, settings) == 1.0
    pace.judge(2.2, 4, settings)
    assert pace.rate(50, settings) == 0.5
    assert (pace.best, pace.best_step, pace.since) == (2.0, 1, 3)


# -- what is told ------------------------------------------------------------------------------------------------
def test_tensorboard_can_read_the_numbers(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    report = go(tmp_path, settings_of(tmp_path))
    found: dict[str, dict[int, float]] = {}
    for file in (tmp_path / "out.training" / "logs").glob("events*"):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    assert set(found) == {
        "train/loss", "train/gradient", "train/rate", "held_out/loss", "held_out/cross_entropy",
    }  # fmt: skip
    assert sorted(found["train/loss"]) == list(range(1, 11))
    assert found["held_out/loss"][8] == pytest.approx(report["held_out"][2]["loss"])
