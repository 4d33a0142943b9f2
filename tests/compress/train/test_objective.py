"""The loss in chunks of rows against the same loss written out whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from miaotui.compress.train import network, objective
from miaotui.compress.train.objective import Objective, Rows, Windows, paired
from miaotui.compress.train.settings import Terms
from miaotui.compress.train.student import Student
from miaotui.compress.train.teacher import Teacher
from tests.compress.train.making import TOKENS, tiny

TERMS = Terms(ce=0.5, kl=0.7, hidden=0.3, temperature=2.0)


def made(tmp_path: Path, terms: Terms = TERMS, **changes: object) -> Objective:
    teacher = Teacher.of(str(tiny.folder(tmp_path / "teacher")))
    student = Student.of(str(tiny.folder(tmp_path / "student", seed=1, num_hidden_layers=1, **changes)))
    return Objective(student, teacher, terms)


def windows() -> Windows:
    tokens = torch.randint(0, TOKENS, (3, 10), generator=torch.Generator().manual_seed(0))
    return Windows(tokens, torch.tensor([False, True, False]))


def whole(made: Objective, given: Windows) -> torch.Tensor:
    """The same loss, from the definitions."""
    terms, tokens = made.terms, given.tokens
    assert made.teacher is not None
    states = made.student.run(tokens, states=frozenset(made.pairs))[0].states
    above = made.teacher.run(tokens, frozenset(made.pairs.values()))
    student = made.student.forward(tokens)[:, :-1]
    teacher = made.teacher.logits(above.last).view(*tokens.shape, -1)[:, :-1]
    true = ~given.own
    ce = F.cross_entropy(student[true].flatten(0, 1), tokens[true][:, 1:].flatten())
    log_q, log_p = (F.log_softmax(x / terms.temperature, -1) for x in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean() * terms.temperature**2
    distances = []
    for layer, other in made.pairs.items():
        own, target = (x.view(3, 10, -1)[:, :-1] for x in (states[layer], above.states[other]))
        projector = made.projectors.get(f"projector.{layer}")
        own = own if projector is None else own @ projector.T
        distances.append((((own - target) ** 2).sum(-1) / (target**2).sum(-1)).mean())
    return terms.ce * ce + terms.kl * kl + terms.hidden * torch.stack(distances).mean()


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 24}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_chunks_and_accumulation_give_the_whole_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], size: int | None
) -> None:
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", 4 * TOKENS)
    one, given = made(tmp_path, **changes), windows()
    assert bool(one.projectors) == ("hidden_size" in changes)
    parameters = one.parameters()
    loss = whole(one, given)
    wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    rows, sums = Rows.of(3, 1, 10), dict.fromkeys(one.weights, 0.0)
    for piece in given.pieces(size):
        for name, value in one.learn(piece, rows).items():
            sums[name] += value
    assert one.loss(sums, rows) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, value), gradient in zip(parameters.items(), wanted, strict=True):
        assert value.grad is not None, name
        assert gradient is not None, name
        np.testing.assert_allclose(value.grad.numpy(), gradient.numpy(), atol=2e-6, rtol=2e-4, err_msg=name)


def test_measuring_is_the_same_loss_and_leaves_no_gradient(tmp_path: Path) -> None:
    one, given = made(tmp_path), windows()
    found = one.measure(given)
    assert one.loss(found, Rows.of(3, 1, 10)) == pytest.approx(float(whole(one, given).detach()), rel=1e-5)
    assert all(value.grad is None for value in one.parameters().values())


def test_a_copy_of_the_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    folder = str(tiny.folder(tmp_path / "teacher"))
    one = Objective(Student.of(folder), Teacher.of(folder), Terms(kl=1.0, hidden=1.0))
    parameters = one.parameters()
    sums = one.learn(windows(), Rows.of(3, 1, 10))
    assert one.loss(sums, Rows.of(3, 1, 10)) == pytest.approx(0, abs=1e-5)
    assert all(float(value.grad.abs().max()) < 1e-4 for value in parameters.values() if value.grad is not None)


def test_layers_are_paired_by_depth() -> None:
    assert paired(1, 6) == {0: 5}
    assert paired(3, 6) == {0: 1, 1: 3, 2: 5}
    deep = paired(26, 30)
    assert (len(deep), deep[25]) == (objective.STATES, 29)
    assert all(abs((above + 1) / 30 - (layer + 1) / 26) < 0.02 for layer, above in deep.items())


def test_products_in_bfloat16_stay_close(tmp_path: Path) -> None:
    student, tokens = tiny.student(tmp_path, num_hidden_layers=1), windows().tokens
    with torch.no_grad():
        plain = student.forward(tokens)
        coarse = student.forward(tokens, torch.bfloat16)
        teacher = network.run(student.spec, student.values, tokens, product=torch.bfloat16)
    assert coarse.dtype == teacher.last.dtype == torch.float32
    assert 0 < float((coarse - plain).abs().max()) < 0.1 * float(plain.abs().max())
