"""Rounding to nearest against quant.rounding (numpy), compressed-tensors, and a search written as a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miaotui.compress.methods.grid import COARSE, FINE, diagonal_blocks, fit, minmax
from miaotui.compress.methods.rtn import rtn
from miaotui.errors import UsageError
from miaotui.quant.rounding import round_to_nearest
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems

SCHEMES = [
    QuantScheme(bits, size, symmetric, kind)
    for bits in (2, 3, 4, 8)
    for size in (16, 64, None)
    for symmetric in (True, False)
    for kind in ("float16", "bfloat16")
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_minmax_is_quant_rounding_bit_for_bit(scheme: QuantScheme) -> None:
    weight = problems.weight(24, 128)
    weight[3] = 0
    for minimum in ("zero_point",) if scheme.symmetric else ("zero_point", "free"):
        ours = rtn(weight, scheme, minimum=minimum).tensor
        theirs = round_to_nearest(weight.numpy(), scheme, minimum)
        assert ours.scheme == theirs.scheme
        np.testing.assert_array_equal(ours.scale, theirs.scale)
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_array_equal(ours.dense32(), theirs.dense32())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("how", ["minmax", "mse", "output"])
def test_values_are_what_the_tensor_means_and_the_error_is_the_output_s(scheme: QuantScheme, how: str) -> None:
    weight, x = problems.weight(24, 128), problems.inputs(200, 128)
    made = rtn(weight, scheme, how=how, moment=problems.moment(x))
    np.testing.assert_array_equal(made.values.numpy(), made.tensor.dense32())
    assert made.error == pytest.approx(problems.relative_error(weight, made.values, x), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("how", ["mse", "output"])
def test_search_finds_the_best_share_of_every_group(how: str, symmetric: bool) -> None:
    scheme = QuantScheme(3, 32, symmetric, "bfloat16")
    weight, x = problems.weight(6, 96), problems.inputs(300, 96)
    found = fit(weight, scheme, how, moment=problems.moment(x)).nearest(weight)
    for row in range(6):
        for group in range(3):
            columns = slice(32 * group, 32 * group + 32)
            part, seen = weight[row : row + 1, columns], x[:, columns] if how == "output" else torch.eye(32)
            least = _least(part, QuantScheme(3, None, symmetric, "bfloat16"), seen)
            got = float((seen @ (found[row, columns] - part[0])).square().sum())
            assert got == pytest.approx(least, rel=1e-3)


def _least(part: torch.Tensor, scheme: QuantScheme, seen: torch.Tensor) -> float:
    """The least error over COARSE shares, then over FINE steps down and up from the best so far."""

    def error(share: float) -> float:
        tried = minmax(part, scheme, ratio=share).nearest(part)
        return float((seen @ (tried - part).T).square().sum())

    least, best = min((error(share), share) for share in COARSE)
    for step in FINE:
        around = [best * (1 - step), best * (1 + step)]
        least, best = min([(least, best), *((error(share), share) for share in around)])
    return least


def test_search_beats_minmax_where_it_should() -> None:
    weight, x = problems.weight(48, 128), problems.inputs(300, 128)
    scheme, moment = QuantScheme(3, 32, True), problems.moment(x)
    plain, clipped, aware = (rtn(weight, scheme, how=how, moment=moment) for how in ("minmax", "mse", "output"))
    assert float((clipped.values - weight).square().sum()) < float((plain.values - weight).square().sum())
    assert aware.error < clipped.error


def test_absmax_is_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = problems.weight(8, 64)
    for symmetric in (True, False):
        args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32)
        groups = weight.unflatten(1, (-1, 32))
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        grid = minmax(weight, QuantScheme(4, 32, symmetric, "float32"))
        torch.testing.assert_close(grid.scale, scale)
        torch.testing.assert_close(grid.zero, zero.float() + 8)  # it stores codes from −8


def test_widths_that_groups_do_not_fill_are_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"576 wide, which groups of 128 do not divide.*groups of 96 or 144") as caught:
        rtn(problems.weight(4, 576), QuantScheme(4, 128, True))
    assert caught.value.exit_code == 2


def test_diagonal_blocks() -> None:
    moment = torch.arange(36.0).view(6, 6)
    blocks = diagonal_blocks(moment, 2)
    assert [b.tolist() for b in blocks] == [[[0, 1], [6, 7]], [[14, 15], [20, 21]], [[28, 29], [34, 35]]]
