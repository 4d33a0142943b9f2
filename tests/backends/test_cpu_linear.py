"""The native linear against its twin, over codes, shapes with tails, rows and instruction sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from miaotui.backends.cpu import _native
from miaotui.backends.cpu.weights import Matrix, matrix
from miaotui.backends.reference.weights import recoded, turned
from miaotui.hardware.processors import Seat
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import BlockTensor, DenseTensor, GroupedTensor, Tensor

KINDS = [
    "float32", "float16", "bfloat16", "w4g32", "w4g64-min", "w4g128", "w8g32", "w8channel", "w3g16", "w6g16-min",
    "w8channel-token", "w4g64-token", "w8g16-token",
]  # fmt: skip
SHAPES = [(16, 32), (48, 64), (37, 96), (5, 20), (130, 576), (64, 1536)]
ISAS = _native.isas()


def stored(kind: str, n: int, k: int, rng: np.random.Generator) -> Tensor:
    """A random stored tensor of this kind."""
    values = rng.standard_normal((n, k)).astype(np.float32)
    if kind == "float32":
        return DenseTensor("float32", values)
    if kind == "float16":
        return DenseTensor("float16", values.astype(np.float16))
    if kind == "bfloat16":
        return DenseTensor("bfloat16", (values.view(np.uint32) >> 16).astype(np.uint16))
    bits = int(kind[1])
    group = None if "channel" in kind else int(kind.split("g")[1].split("-")[0])
    scheme = QuantScheme(bits, group, not kind.endswith("-min"), "float32" if bits == 6 else "float16")
    groups = scheme.groups(k)
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scale = (rng.random((n, groups)) * 0.1 + 0.01).astype(np.float16).astype(np.float32)
    minimum = None if scheme.symmetric else rng.standard_normal((n, groups)).astype(np.float16).astype(np.float32)
    return GroupedTensor(scheme, codes, scale, minimum, by_token=kind.endswith("-token"))


def quantised(x: NDArray[np.float32], by_token: bool, group: int = 32) -> NDArray[np.float64]:
    """int8 per `group` neighbours, or by token, as the fast path sees x."""
    width = x.shape[1]
    groups = x[:, None] if by_token else np.pad(x, ((0, 0), (0, -width % group))).reshape(x.shape[0], -1, group)
    most = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.where(most > 0, np.float32(127) / np.where(most > 0, most, 1), 0).astype(np.float32)
    codes = np.rint(groups * inverse).astype(np.float64)
    return (codes * (most / np.float32(127)).astype(np.float64)).reshape(x.shape[0], -1)[:, :width]


class LinearProgram:
    """A program of one linear over given rows, driven by way of an embedding whose table is the rows."""

    def __init__(
        self,
        isa: str,
        rows: NDArray[np.float32],
        weight: Matrix,
        threads: int = 2,
        seats: Sequence[Seat] = (),
        **options: object,
    ) -> None:
        pool = _native.Pool(threads, seats)
        count, width = rows.shape
        self.count, self.height = count, weight.height
        before, after = _native.row_stride(width), _native.row_stride(weight.height)
        self.program = _native.Program(pool, isa, count, 1, 1, 64, 2 * count * (before + 2 * after) + 64)
        table = matrix(pool, _native.Heap(), DenseTensor("float32", rows))
        self.out = (-(-count * before // 16) * 16, weight.height)
        given: dict[str, object] = {
            "biases": [None], "norm_weight": None, "norm_bias": None, "norm_eps": 0.0, "norm_layer": False,
            "add": None, "scale": 1.0, "softcap": 0.0, "act": "none", "gated": False, "quantised": True,
            "of_logits": False, "perm": None, "hands_on": False, "handed": False, "wide": [],
            "weights": [weight.packed], "columns": [0],
        }  # fmt: skip
        given.update(options)
        self.program.embed(table.packed, 1.0, (0, width))
        self.program.linear(name="linear", x=(0, width), out=self.out, **given)
        self.program.finish()
        self.program.allocate_cache(1)

    def run(self) -> NDArray[np.float32]:
        ids = np.arange(self.count, dtype=np.int32)
        start = np.array([0, self.count], np.int32)
        zero = np.zeros((1, 4), np.int32)
        self.program.run(ids, ids, start, np.array([self.count], np.int32), zero, ids[:1])
        return np.array(self.program.view(self.out, self.count))


def packed(tensor: Tensor) -> Matrix:
    return matrix(_native.Pool(2), _native.Heap(), tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_keeps_every_value(kind: str) -> None:
    rng = np.random.default_rng(1)
    for n, k in SHAPES:
        tensor = stored(kind, n, k, rng)
        assert np.array_equal(packed(tensor).packed.dequantise(), tensor.dense32()), (n, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", ["auto", "fp32"])
def test_linear_equals_its_twin(isa: str, kind: str, compute: str) -> None:
    rng = np.random.default_rng(2)
    for (n, k), rows in zip(SHAPES, [1, 2, 5, 13, 61, 7], strict=True):
        tensor, x = stored(kind, n, k, rng), rng.standard_normal((rows, k)).astype(np.float32)
        exact = compute == "fp32" or isinstance(tensor, DenseTensor)
        seen = x.astype(np.float64) if exact else quantised(x, kind.endswith("-token"))
        want = seen @ tensor.dense32().astype(np.float64).T
        got = LinearProgram(isa, x, packed(tensor), quantised=compute == "auto").run()
        bound = np.abs(seen) @ np.abs(tensor.dense32().astype(np.float64)).T
        assert np.all(np.abs(got - want) <= 1e-5 * bound + 1e-6), (n, k, rows, np.abs(got - want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] == "w"])
def test_the_largest_codes_overflow_nothing(isa: str, kind: str) -> None:
    """Codes that are all the least or the greatest, inputs that all are 127: sums of products as large as they get."""
    rng = np.random.default_rng(4)
    tensor = stored(kind, 48, 192, rng)
    assert isinstance(tensor, GroupedTensor)
    codes = np.zeros_like(tensor.codes)
    codes[::2] = (1 << tensor.scheme.bits) - 1
    tensor = replace(tensor, codes=codes)
    x = np.array([[1.0], [-1.0], [2.0], [-0.5], [1.0], [-3.0]], np.float32) * np.ones((6, 192), np.float32)
    x[4, 1::2] *= -1
    for rows in (1, 2, 6):
        got = LinearProgram(isa, x[:rows], packed(tensor)).run()
        w = tensor.dense32().astype(np.float64)
        bound = np.abs(x[:rows]).astype(np.float64) @ np.abs(w).T
        assert np.all(np.abs(got - x[:rows].astype(np.float64) @ w.T) <= 1e-5 * bound + 1e-6), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_threads(isa: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    weight, x = packed(stored(kind, 50, 160, rng)), rng.standard_normal((29, 160)).astype(np.float32)
    for compute in (True, False):
        whole = LinearProgram(isa, x, weight, quantised=compute).run()
        for begin, end, threads in [(0, 1, 1), (3, 5, 2), (7, 12, 1), (3, 12, 2), (0, 10, 1), (5, 16, 2), (11, 24, 3)]:
            part = LinearProgram(isa, x[begin:end], weight, threads, quantised=compute).run()
            assert np.array_equal(part, whole[begin:end]), (begin, end)


def widened(isa: str, weight: Matrix) -> list[_native.PackedWeight]:
    return [_native.PackedWeight.wide(_native.Pool(2), _native.Heap(), weight.packed, isa)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] == "w" and "token" not in kind])
def test_recoded_weights_meet_many_rows(isa: str, kind: str) -> None:
    """int8 with one scale a row against inputs quantised by 64, from 16 rows on; as it was below."""
    rng = np.random.default_rng(5)
    for (n, k), rows in zip(SHAPES, [16, 17, 61, 33, 29, 36], strict=True):
        tensor, x = stored(kind, n, k, rng), rng.standard_normal((rows, k)).astype(np.float32)
        weight = packed(tensor)
        wide = recoded(tensor, torch.from_numpy(tensor.dense32()))
        assert wide is not None
        seen, w = quantised(turned(torch.from_numpy(x)).numpy(), False, 64), wide.double().numpy()
        got = LinearProgram(isa, x, weight, wide=widened(isa, weight)).run()
        assert np.all(np.abs(got - seen @ w.T) <= 1e-5 * (np.abs(seen) @ np.abs(w).T) + 1e-6), (n, k, rows)
        few = LinearProgram(isa, x[:15], weight, wide=widened(isa, weight)).run()
        assert np.array_equal(few, LinearProgram(isa, x[:15], weight).run())


@pytest.mark.parametrize("isa", ISAS)
def test_recoded_weights_give_a_row_the_same_bits_in_any_large_batch(isa: str) -> None:
    rng = np.random.default_rng(6)
    weight, x = packed(stored("w4g32", 50, 160, rng)), rng.standard_normal((61, 160)).astype(np.float32)
    wide = widened(isa, weight)
    whole = LinearProgram(isa, x, weight, wide=wide).run()
    for begin, end, threads in [(0, 16, 1), (3, 20, 2), (30, 61, 3)]:
        part = LinearProgram(isa, x[begin:end], weight, threads, wide=wide).run()
        assert np.array_equal(part, whole[begin:end]), (begin, end)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["w8channel", "w4g32", "w4g64-min"])
def test_recoding_gives_the_twins_codes(isa: str, kind: str) -> None:
    tensor = stored(kind, 40, 96, np.random.default_rng(7))
    wide = recoded(tensor, torch.from_numpy(tensor.dense32()))
    assert wide is not None
    assert np.allclose(widened(isa, packed(tensor))[0].dequantise(), wide.numpy(), rtol=1e-6, atol=0)


def test_turning_twice_gives_the_values_back() -> None:
    x = torch.from_numpy(np.random.default_rng(8).standard_normal((3, 70)).astype(np.float32))
    once = turned(x)
    assert once.shape == (3, 96)
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for i in range(32)] for j in range(32)])
    assert torch.allclose(once[:, :32], x[:, :32] @ matrix.T, atol=1e-5)
    assert torch.allclose(turned(once)[:, :70] / 32, x, atol=1e-5)


def test_what_cannot_be_recoded_is_refused() -> None:
    rng = np.random.default_rng(8)
    for kind in ("float32", "w8channel-token"):
        with pytest.raises(ValueError, match="only integer weights"):
            widened(ISAS[0], packed(stored(kind, 16, 32, rng)))
    weight, other = packed(stored("w4g32", 16, 32, rng)), packed(stored("w4g32", 32, 32, rng))
    with pytest.raises(ValueError, match="another matrix"):
        LinearProgram(ISAS[0], np.zeros((1, 32), np.float32), weight, wide=widened(ISAS[0], other))


@pytest.mark.parametrize("isa", ISAS)
def test_epilogue_and_prologue(isa: str) -> None:
    """norm before; bias, scale, residual and soft cap after; gate times up; a permuted input."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    gate, up = stored("float32", 40, 64, rng), stored("float32", 40, 64, rng)
    w, bias = rng.standard_normal(64).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * w
    g, u = normed @ gate.dense32().T + bias, normed @ up.dense32().T
    options = {"norm_weight": w, "norm_eps": 1e-5}
    got = LinearProgram(isa, x, packed(gate), biases=[bias], scale=0.5, softcap=3.0, **options).run()
    np.testing.assert_allclose(got, 3 * np.tanh(g * 0.5 / 3), rtol=2e-5, atol=2e-5)
    both = [packed(gate).packed, packed(up).packed]
    got = LinearProgram(
        isa, x, packed(gate), weights=both, columns=[0, 40], biases=[bias, None], act="silu", gated=True, **options
    ).run()
    np.testing.assert_allclose(got, g / (1 + np.exp(-g)) * u, rtol=2e-5, atol=2e-5)
    perm = rng.permutation(64).astype(np.int32)
    got = LinearProgram(isa, x, packed(gate), perm=perm).run()
    np.testing.assert_allclose(got, x[:, perm] @ gate.dense32().T, rtol=2e-5, atol=2e-5)


def test_gguf_blocks_go_to_panels_bit_for_bit() -> None:
    rng = np.random.default_rng(5)
    for kind, size in {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}.items():
        raw = rng.integers(0, 256, (21, 3, size), dtype=np.uint8)
        raw[:, :, :2] = rng.random((21, 3, 1)).astype(np.float16).view(np.uint8)
        if kind == "Q4_1":
            raw[:, :, 2:4] = rng.standard_normal((21, 3, 1)).astype(np.float16).view(np.uint8)
        tensor = BlockTensor(kind, raw.reshape(21, -1), (21, 96))
        assert np.array_equal(packed(tensor).packed.dequantise(), tensor.dense32()), kind


@pytest.mark.parametrize(
    ("options", "wrong"), [({"hands_on": True}, "no op takes"), ({"handed": True}, "the op before hands nothing on")]
)
def test_what_is_handed_on_has_two_sides(options: dict[str, bool], wrong: str) -> None:
    rng = np.random.default_rng(4)
    weight, x = packed(stored("w4g32", 64, 64, rng)), rng.standard_normal((3, 64)).astype(np.float32)
    with pytest.raises(ValueError, match=wrong):
        LinearProgram(ISAS[0], x, weight, **options)
