"""Differential privacy: the gradient is Opacus's definition of it, ε is counted, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant

from miaotui.compress.train.privacy import Private
from miaotui.compress.train.settings import Privacy, Settings, Task, Terms
from miaotui.errors import UsageError
from tests.compress.train.running import SMALL, go, write_text

WANTED = Privacy(8.0, 1e-4)


def private_settings(tmp_path: Path, **changes: object) -> Settings:
    tasks = (Task(str(write_text(tmp_path / "text.txt", words=4000))),)
    settings = replace(SMALL, tasks=tasks, held_out=0.0, privacy=WANTED, terms=Terms(kl=1.0), steps=6)
    return replace(settings, **changes)  # type: ignore[arg-type]


def test_gradients_are_clipped_one_by_one_summed_and_noised() -> None:
    torch.manual_seed(0)
    parameters = [torch.zeros(3, 2, requires_grad=True), torch.zeros(5, requires_grad=True)]
    private = Private(WANTED, steps=10, batch=4, windows=100, clip=1.0, seed=7)
    private.begin(parameters)
    wanted = [torch.zeros(3, 2), torch.zeros(5)]
    for size in (0.1, 1.0, 30.0):
        gradients = [torch.randn_like(p) * size for p in parameters]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for parameter, gradient, total in zip(parameters, gradients, wanted, strict=True):
            parameter.grad = gradient
            total += gradient * min(1.0, 1.0 / float(norm))
        private.add()
    private.end()
    generator = torch.Generator().manual_seed(7)
    for parameter, total in zip(parameters, wanted, strict=True):
        noise = torch.normal(0, private.noise, parameter.shape, generator=generator)
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), ((total + noise) / 4).numpy(), rtol=1e-4, atol=1e-5)


def test_an_empty_batch_is_noise_and_is_counted() -> None:
    parameter = torch.zeros(1000, requires_grad=True)
    private = Private(WANTED, steps=10, batch=1, windows=100, clip=0.5, seed=7)
    private.begin([parameter])
    private.end()
    assert parameter.grad is not None
    assert float(parameter.grad.std()) == pytest.approx(private.noise * 0.5, rel=0.1)
    assert private.history == [[private.noise, 0.01, 1]]


def test_a_private_training_reports_what_it_spent(tmp_path: Path) -> None:
    lines: list[str] = []
    report = go(tmp_path, private_settings(tmp_path), say=lines.append)
    spent = report["privacy"]
    account = RDPAccountant()
    account.history = [(spent["noise"], spent["sample_rate"], 6)]
    assert spent["epsilon"] == pytest.approx(account.get_epsilon(WANTED.delta))
    assert 0.5 * WANTED.epsilon < spent["epsilon"] <= WANTED.epsilon
    assert spent["delta"] == WANTED.delta
    assert report["held_out"] == []
    assert not any("loss" in line for line in lines)


def test_it_goes_on_with_the_account_and_the_noise(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    whole = go(tmp_path / "whole", private_settings(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", private_settings(tmp_path), tell=stop)
    assert go(tmp_path / "cut", private_settings(tmp_path))["privacy"] == whole["privacy"]
    one, other = ((tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"held_out": 0.1}, "held-out windows"),
        ({"on_policy": 0.5}, "windows that the student wrote"),
        ({"tasks": (Task("a"), Task("b"))}, "tasks mixed by weight"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(changes: dict[str, object], why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot account for {why}"):
        private_settings(tmp_path, **changes)


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="allows publishing one of them"):
        Private(Privacy(3.0, 0.1), steps=10, batch=4, windows=100, clip=1.0, seed=0)
    with pytest.raises(UsageError, match="is drawn of 3"):
        Private(WANTED, steps=10, batch=4, windows=3, clip=1.0, seed=0)
    with pytest.raises(UsageError, match="No noise gives"):
        Private(Privacy(1e-6, 1e-6), steps=10_000, batch=40, windows=100, clip=1.0, seed=0)
    for epsilon, delta in ((0.0, 0.1), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(UsageError):
            Privacy(epsilon, delta)
