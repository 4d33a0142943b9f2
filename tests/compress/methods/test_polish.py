"""Polishing against loops in float64 and least squares on the inputs themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miaotui.compress.methods.gptq import GptqOptions, gptq
from miaotui.compress.methods.grid import Grid, fit, output_error
from miaotui.compress.methods.polish import descend, polish, refit
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems

SCHEMES = [
    QuantScheme(3, 16, True, "bfloat16"),
    QuantScheme(3, 16, False, "float16"),
    QuantScheme(4, None, True, "float32"),
]
KINDS = [(SCHEMES[0], "zero_point"), (SCHEMES[1], "zero_point"), (SCHEMES[1], "free"), (SCHEMES[2], "zero_point")]


def problem(scheme: QuantScheme, minimum: str, width: int = 48) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    weight, x = problems.weight(20, width), problems.inputs(300, width)
    return weight, x, fit(weight, scheme, minimum=minimum)


def slow_descend(weight: torch.Tensor, grid: Grid, codes: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Every code of every row set to the best of all codes, all others being as they are: by trying each."""
    codes = codes.clone()
    for row in range(len(weight)):
        part, one = grid.rows(slice(row, row + 1)), codes[row : row + 1].clone()
        for j in range(weight.shape[1]):
            tries = one.repeat(grid.top + 1, 1)
            tries[:, j] = torch.arange(grid.top + 1.0)
            wrong = torch.cat([part.values(t[None]) for t in tries]).double() - weight[row].double()
            one[0, j] = float(((wrong @ moment.double()) * wrong).sum(1).argmin())
        codes[row] = one[0]
    return codes


@pytest.mark.parametrize(("scheme", "minimum"), KINDS, ids=str)
def test_codes_are_the_best_of_all_one_at_a_time(scheme: QuantScheme, minimum: str) -> None:
    weight, x, grid = problem(scheme, minimum)
    start = grid.codes(weight)
    ours = descend(weight, grid, start, problems.moment(x))
    theirs = slow_descend(weight, grid, start, problems.moment(x))
    assert (ours == theirs).float().mean() > 0.99  # ties, in float32
    assert (ours != start).float().mean() > 0.1


def test_codes_over_several_blocks() -> None:
    weight, x, grid = problem(SCHEMES[0], "zero_point", 320)
    moment = problems.moment(x)
    start = grid.codes(weight)
    rest, codes = moment.double() @ (weight - grid.values(start)).double().T, start.clone()
    for j in range(320):
        scale, zero = grid.scale[:, j // 16].double(), grid.zero[:, j // 16].double()
        before = (codes[:, j] - zero) * scale
        codes[:, j] = (torch.round((before + rest[j] / moment[j, j]) / scale) + zero).clamp(0, 7).float()
        rest -= moment[:, j : j + 1].double() * ((codes[:, j] - zero) * scale - before)
    assert (descend(weight, grid, start, moment) == codes).float().mean() > 0.99


@pytest.mark.parametrize(("scheme", "minimum"), KINDS, ids=str)
def test_scales_are_the_least_squares_on_the_inputs(
    scheme: QuantScheme, minimum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miaotui.compress.methods.polish.RIDGE", 1e-6)
    scheme = replace(scheme, scale_type="float32")
    weight, x, grid = problem(scheme, minimum)
    codes = grid.codes(weight)
    found = refit(weight, grid, codes, problems.moment(x))
    groups = grid.scale.shape[1]
    for row in range(0, 20, 7):
        shift = grid.zero[row] if grid.zero is not None else torch.zeros(groups)
        floor = torch.zeros(groups) if grid.minimum is None else grid.minimum[row]
        unit = codes[row].view(groups, -1) - shift[:, None]
        columns = torch.stack([x.view(len(x), groups, -1)[:, g] @ unit[g] for g in range(groups)], 1).double()
        target = x.double() @ (weight[row].view(groups, -1) - floor[:, None]).flatten().double()
        want = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0].float()
        torch.testing.assert_close(found.scale[row], want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("scheme", "minimum"), KINDS, ids=str)
def test_every_turn_lowers_the_error(scheme: QuantScheme, minimum: str) -> None:
    weight, x, _ = problem(scheme, minimum, 96)
    moment = problems.moment(x)
    plain = gptq(weight, scheme, moment, minimum=minimum)
    errors = [plain.error]
    errors += [gptq(weight, scheme, moment, GptqOptions(polish=n), minimum=minimum).error for n in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.97 * errors[0]
    made = gptq(weight, scheme, moment, GptqOptions(polish=1), minimum=minimum)
    np.testing.assert_array_equal(made.values.numpy(), made.tensor.dense32())
    assert made.error == pytest.approx(problems.relative_error(weight, made.values, x), rel=1e-3)


def test_dead_inputs_and_dead_rows_are_left_alone() -> None:
    weight, x = problems.weight(12, 64), problems.inputs(40, 64)
    x[:, 5], x[:, 16:32], weight[3] = 0, 0, 0
    grid = fit(weight, SCHEMES[0])
    start = grid.codes(weight)
    better, codes = polish(weight, grid, start, problems.moment(x), 1)
    assert bool(torch.isfinite(better.scale).all())
    torch.testing.assert_close(better.scale[:, 1], grid.scale[:, 1])
    assert torch.equal(codes[:, 5], start[:, 5])
    assert torch.equal(codes[3], start[3])
    made = gptq(weight, SCHEMES[0], problems.moment(x), GptqOptions(polish=1))
    assert bool((made.values[:, 5] == 0).all())


def test_rows_do_not_depend_on_how_many_are_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, grid = problem(SCHEMES[0], "zero_point")
    codes, moment = grid.codes(weight), problems.moment(x)
    whole = refit(weight, grid, codes, moment).scale
    monkeypatch.setattr("miaotui.compress.methods.polish.ROWS_BYTES", 100)
    torch.testing.assert_close(refit(weight, grid, codes, moment).scale, whole, rtol=4e-3, atol=0)
    assert output_error(weight, grid.values(codes), moment) > 0


def test_turns_are_checked() -> None:
    with pytest.raises(UsageError, match="turns"):
        GptqOptions(polish=-1)
