"""Rounding: within half a step, exact scale types, and compressed-tensors' own ranges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miaotui.quant.rounding import Minimum, bfloat16_bits, encode, round_to_nearest, to_scale_type
from miaotui.quant.scheme import QuantScheme, ScaleType

SCALE_TYPES: tuple[ScaleType, ...] = ("float16", "bfloat16", "float32")


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8), group=st.sampled_from([None, 16, 32, 33]), symmetric=st.booleans(),
    kind=st.sampled_from(SCALE_TYPES), minimum=st.sampled_from(["zero_point", "free"]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 100)), spread=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_error_is_about_half_a_step(
    bits: int, group: int | None, symmetric: bool, kind: ScaleType, minimum: Minimum, shape: tuple[int, int],
    spread: float, seed: int,
) -> None:  # fmt: skip
    weight = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(spread)
    tensor = round_to_nearest(weight, QuantScheme(bits, group, symmetric, kind), minimum)
    assert tensor.shape == shape
    assert tensor.codes.max() < 1 << bits
    step = np.repeat(tensor.scale, group or shape[1], axis=1)[:, : shape[1]]
    # Half a step; at the ends of the range another half for the clipped top code, and a little for 16-bit scales.
    slack = 0.55 if bits < 8 else 1.6
    assert np.all(np.abs(tensor.dense32() - weight) <= step * (slack + 0.55))
    if tensor.scheme.scale_type == kind:
        np.testing.assert_array_equal(to_scale_type(tensor.scale, kind), tensor.scale)


def test_zeros_stay_zeros() -> None:
    for symmetric in (True, False):
        tensor = round_to_nearest(np.zeros((2, 32), np.float32), QuantScheme(4, 32, symmetric))
        np.testing.assert_array_equal(tensor.dense32(), 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_and_codes_are_those_of_compressed_tensors(symmetric: bool, bits: int) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = np.random.default_rng(0).standard_normal((6, 64), np.float32)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    groups = torch.from_numpy(weight).reshape(6, 2, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    tensor = round_to_nearest(weight, QuantScheme(bits, 32, symmetric, "float32"))
    np.testing.assert_allclose(tensor.scale, scale.numpy(), rtol=1e-6)
    codes = quantize(torch.from_numpy(weight), scale, zero, args, dtype=torch.int8).numpy().astype(np.int32)
    ours = tensor.codes.astype(np.int32) - (1 << (bits - 1))
    assert np.mean(codes == ours) > 0.99  # ties may fall either way with a scale one ulp apart
    assert np.abs(codes - ours).max() <= 1


def test_encode_with_given_scales() -> None:
    weight = np.array([[0.0, 1.0, 2.0, 15.0]], np.float32)
    scheme = QuantScheme(4, 4, False)
    codes = encode(weight, scheme, np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    np.testing.assert_array_equal(codes, [[0, 1, 2, 15]])


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    values = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(bfloat16_bits(values)[finite], expected[finite])
    assert np.all((bfloat16_bits(values)[~finite] & 0x7FFF) > 0x7F80)
