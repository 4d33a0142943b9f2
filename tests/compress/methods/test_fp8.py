"""fp8 and int8 numerics against a table of all e4m3 numbers, and against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miaotui.compress.methods.fp8 import LARGEST, fp8_activations, fp8_weight, int8_activations, static_scale
from tests.compress.methods import problems


def e4m3(byte: int) -> float:
    """The number of a byte by its fields: sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign, exponent, mantissa = (-1) ** (byte >> 7), (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


NUMBERS = np.array([e4m3(byte) for byte in range(256)])


def nearest(x: float) -> float:
    """By distance to every number; of two at the same, the one whose mantissa is even."""
    by_distance = sorted((abs(n - x), byte & 1, byte) for byte, n in enumerate(NUMBERS) if not math.isnan(n))
    return float(NUMBERS[by_distance[0][2]])


def test_weights_are_the_nearest_numbers_of_a_row_s_scale() -> None:
    weight = problems.weight(6, 40)
    weight[2] = 0
    made = fp8_weight(weight)
    np.testing.assert_array_equal(NUMBERS[made.tensor.data] * made.tensor.scale, made.values.double().numpy())
    for row in range(6):
        scale = float(weight[row].abs().max()) / LARGEST
        want = float(torch.tensor(scale or 1.0).bfloat16())
        assert made.tensor.scale[row, 0] == want
        values = [nearest(float(torch.tensor(v) / want)) * want for v in weight[row].tolist()]
        assert made.values[row].tolist() == pytest.approx(values)
    assert made.error == pytest.approx(problems.relative_error(weight, made.values, torch.eye(40)), rel=1e-4)
    assert 0 < made.error < 2**-8


def test_the_error_of_a_weight_is_that_of_its_outputs() -> None:
    weight, x = problems.weight(6, 40), problems.inputs(80, 40)
    made = fp8_weight(weight, "float32", problems.moment(x))
    assert made.error == pytest.approx(problems.relative_error(weight, made.values, x), rel=1e-3)


def test_nothing_becomes_nan_beyond_the_range() -> None:
    x = torch.tensor([[1e6, -1e6, 1.0, 0.0]])
    assert fp8_activations(x, torch.tensor(1.0)).tolist() == [[LARGEST, -LARGEST, 1.0, 0.0]]
    assert int8_activations(x, torch.tensor(1.0)).tolist() == [[127.0, -128.0, 1.0, 0.0]]


def test_activations_have_a_scale_for_each_token() -> None:
    x = problems.inputs(5, 24).view(5, 24)
    x[3] = 0
    eight, whole = fp8_activations(x), int8_activations(x)
    for row in (0, 1, 2, 4):
        peak = float(x[row].abs().max())
        fp8_scale, int8_scale = torch.tensor(peak) / LARGEST, torch.tensor(peak) / 127.5
        want = [nearest(float(v / fp8_scale)) * float(fp8_scale) for v in x[row]]
        assert eight[row].tolist() == pytest.approx(want, rel=1e-6)
        codes = [max(-128, min(127, round(float(v / int8_scale)))) for v in x[row]]
        assert whole[row].tolist() == pytest.approx([c * float(int8_scale) for c in codes], rel=1e-6)
    assert bool((eight[3] == 0).all())
    assert bool((whole[3] == 0).all())


def test_int8_is_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = problems.inputs(7, 32)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
    torch.testing.assert_close(int8_activations(x), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("change", [fp8_activations, int8_activations])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.05)])
def test_gradients_pass_straight_through(change: object, scale: torch.Tensor | None) -> None:
    assert callable(change)
    x = problems.inputs(3, 8).requires_grad_()
    made = change(x, scale)
    torch.testing.assert_close(made.detach(), change(x.detach(), scale), rtol=1e-6, atol=1e-6)
    (made * torch.arange(8.0)).sum().backward()
    torch.testing.assert_close(x.grad, torch.arange(8.0).expand(3, 8))


def test_static_scales() -> None:
    peak = torch.tensor([0.5, 3.0, 1.0])
    assert static_scale(peak, "fp8") == pytest.approx(3 / 448)
    assert static_scale(3.0, "int8") == pytest.approx(3 / 127.5)
    assert static_scale(torch.zeros(3), "int8") == 1
