"""The native draws and scores against their numpy twin, on every instruction set: same number, same token."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from miaotui.backends.cpu._native import Pool
from numpy.typing import NDArray

from miaotui.engine.draws import NumpyDraws, draw
from miaotui.engine.params import SamplingParams

native_draws = pytest.importorskip("miaotui.engine.native_draws", reason="the native kernels are not built")

from miaotui.backends.cpu import _native  # noqa: E402

ISAS = [isa for isa in _native.isas() if isa != "avx512bf16"]
CONTROLS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((0.5, 1.0, 1.7), (0, 1, 7, 60, 5000), (1.0, 0.3, 0.9, 0.999), (0.0, 0.01, 1.0))
]
SIZES = [1, 2, 63, 64, 65, 260, 1000, 4099]
NEAR = 1e-5
"""Numbers so near to each other may fall on different sides of a boundary."""


def rows(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    """Rows as models make them and as they do not: peaked, flat, of few values, masked, equal, hopeless but for one."""
    made = rng.normal(size=(7, n)) * np.array([[6.0], [1.0], [0.01], [3.0], [3.0], [0.0], [1.0]])
    made[3] = np.round(made[3])
    made[4, rng.random(n) < 0.9] = -np.inf
    made[4, rng.integers(n)] = 0.0
    made[6] -= 500.0 * (np.arange(n) != rng.integers(n))
    return made.astype(np.float32)


def near(row: NDArray[np.float32], params: SamplingParams, u: float) -> set[int]:
    """Tokens that numpy draws when the numbers move within their rounding."""
    found = set()
    for up, of in itertools.product((0.0, -NEAR, NEAR), repeat=2):
        moved = SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            min_p=params.min_p,
            top_p=params.top_p if params.top_p == 1.0 else params.top_p * (1 + of),
        )
        found.add(draw(row, moved, min(max(u + up, 0.0), 1.0 - 2**-53)))
    return found


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
def test_native_draws_are_numpys(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    logits = rows(rng, n)
    asked = [(r, params, float(u)) for r in range(len(logits)) for params in CONTROLS for u in (0.0, *rng.random(2))]
    at, params, uniforms = (list(column) for column in zip(*asked, strict=True))
    found = native_draws.NativeDraws(isa=isa).draw(logits, at, params, uniforms)
    wanted = NumpyDraws().draw(logits, at, params, uniforms)
    different = [i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
    assert len(different) < len(asked) / 200
    assert all(found[i] in near(logits[at[i]], params[i], uniforms[i]) for i in different)
    assert all(logits[r, token] > -np.inf for r, token in zip(at, found, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
def test_native_scores_are_numpys(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    logits = rows(rng, n)[:, ::1]
    at = [r for r in range(len(logits)) for _ in range(5)]
    tokens = rng.integers(0, n, len(at)).tolist()
    for top in sorted({0, 1, min(5, n), min(100, n), n}):
        found = native_draws.NativeDraws(isa=isa).score(logits, at, tokens, top)
        for one, other in zip(found, NumpyDraws().score(logits, at, tokens, top), strict=True):
            assert one.rank == other.rank
            assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
            assert [t for t, _ in one.likeliest] == [t for t, _ in other.likeliest]
            assert [p for _, p in one.likeliest] == pytest.approx([p for _, p in other.likeliest], abs=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_a_number_is_survived(isa: str) -> None:
    logits = np.full((3, 100), np.nan, np.float32)
    logits[1] = -np.inf
    logits[2, 3] = np.inf
    at = [0, 1, 2] * len(CONTROLS)
    params = [p for p in CONTROLS for _ in range(3)]
    tokens = native_draws.NativeDraws(isa=isa).draw(logits, at, params, [0.5] * len(at))
    assert all(0 <= token < 100 for token in tokens)


def test_rows_outside_are_refused() -> None:
    logits = np.zeros((2, 8), np.float32)
    draws = native_draws.NativeDraws()
    for row in (-1, 2):
        with pytest.raises(IndexError):
            draws.draw(logits, [row], [SamplingParams()], [0.5])
    with pytest.raises(IndexError):
        draws.score(logits, [0], [8], 1)
    with pytest.raises(ValueError, match="close"):
        draws.draw(np.zeros((2, 16), np.float32)[:, ::2], [0], [SamplingParams()], [0.5])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_likeliest_are_numpys(isa: str, threads: int) -> None:
    rng = np.random.default_rng(9)
    draws = native_draws.NativeDraws(SimpleNamespace(pool=Pool(threads), likeliest=lambda logits, rows: None), isa)
    for n in (1, 15, 1024, 5000):
        logits = rng.integers(-30, 30, (7, n)).astype(np.float32)  # with ties
        logits[3] = -np.inf
        for at in (list(range(7)), [5, 0, 5]):
            assert draws.likeliest(logits, at) == NumpyDraws().likeliest(logits, at)
    with pytest.raises(IndexError):
        draws.likeliest(np.zeros((2, 8), np.float32), [2])
