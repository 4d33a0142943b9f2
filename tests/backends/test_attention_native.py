"""The native attention kernels of every instruction set of this machine against float64 numpy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

native = pytest.importorskip("miaotui.backends.cpu._native", reason="the native kernels are not built")

Floats = NDArray[np.floating[Any]]
BLOCK = 16
CACHE = {"fp32": 0, "bf16": 1, "int8": 2}
ISAS = native.attention_isas()


@dataclass(frozen=True)
class Layer:
    """One layer's attention and the instruction set that computes it."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    cache: str = "fp32"
    isa: str = "portable"
    threads: int = 1
    softcap: float = 0.0
    window: int = 0
    inv_freq: NDArray[np.float32] | None = None
    factor: float = 1.0
    interleaved: bool = False
    q_norm: NDArray[np.float32] | None = None
    k_norm: NDArray[np.float32] | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Machine:
    """A layer with its cache: sequences grow by steps."""

    layer: Layer
    blocks: int = 64
    tables: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    merged: bool = False

    def __post_init__(self) -> None:
        size = native.cache_layer_bytes(CACHE[self.layer.cache], self.layer.kv_heads, self.layer.head_dim)
        self.memory = np.zeros(self.blocks * size, np.uint8)
        self.free = list(np.random.default_rng(5).permutation(self.blocks))

    def step(self, rows: dict[int, Floats]) -> dict[int, NDArray[np.float32]]:
        """Give sequences new qkv rows `[tokens, width]`; their attention outputs `[tokens, heads · head_dim]`."""
        layer = self.layer
        positions: list[int] = []
        starts = [0]
        for seq, new in rows.items():
            begin = self.lengths.get(seq, 0)
            positions += range(begin, begin + len(new))
            starts.append(len(positions))
            self.lengths[seq] = begin + len(new)
            table = self.tables.setdefault(seq, [])
            while len(table) * BLOCK < self.lengths[seq]:
                table.append(int(self.free.pop()))
        stride = max(len(self.tables[seq]) for seq in rows)
        block_table = np.zeros((len(rows), stride), np.int32)
        for i, seq in enumerate(rows):
            block_table[i, : len(self.tables[seq])] = self.tables[seq]
        qkv = np.ascontiguousarray(np.concatenate(list(rows.values())), np.float32).copy()
        out = np.empty((len(positions), layer.heads * layer.head_dim), np.float32)
        self.merged = native.run_attention(
            layer.isa, layer.threads, qkv, self.memory, out, np.array(positions, np.int32), np.array(starts, np.int32),
            np.array([self.lengths[seq] for seq in rows], np.int32), block_table, heads=layer.heads,
            kv_heads=layer.kv_heads, head_dim=layer.head_dim, cache_type=CACHE[layer.cache], scale=layer.scale,
            softcap=layer.softcap, window=layer.window, inv_freq=layer.inv_freq, factor=layer.factor,
            interleaved=layer.interleaved, q_norm=layer.q_norm, k_norm=layer.k_norm, max_model_len=self.blocks * BLOCK,
        )  # fmt: skip
        return {seq: out[a:b] for seq, a, b in zip(rows, starts[:-1], starts[1:], strict=True)}


def make_rows(layer: Layer, tokens: int, seed: int = 0) -> NDArray[np.float32]:
    width = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
    return (np.random.default_rng(seed).standard_normal((tokens, width)) * 1.5).astype(np.float32)


def rounded(x: Floats, cache: str) -> Floats:
    """x `[..., head_dim]` as the cache gives it back."""
    if cache == "bf16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    if cache == "int8":
        scale = np.abs(x).max(-1, keepdims=True) / 127
        return np.round(x / np.where(scale == 0, 1, scale)) * scale
    return x


def normed(x: Floats, weight: NDArray[np.float32] | None) -> Floats:
    """RMS norm of x `[tokens, heads, head_dim]` per head, or over all heads if the weight is that wide."""
    if weight is None:
        return x
    wide = x.reshape(len(x), -1, weight.size)
    return (wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight).reshape(x.shape)


def turned(x: Floats, layer: Layer) -> Floats:
    if layer.inv_freq is None:
        return x
    angle = (np.arange(len(x), dtype=np.float32)[:, None] * layer.inv_freq).astype(np.float64)[:, None]
    cos, sin = np.cos(angle) * layer.factor, np.sin(angle) * layer.factor
    half = layer.inv_freq.size
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if layer.interleaved else (
        slice(0, half), slice(half, 2 * half))  # fmt: skip
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def expected(layer: Layer, rows: Floats) -> Floats:
    """Attention of a whole sequence in float64."""
    heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim
    q, k, v = np.split(rows.astype(np.float64).reshape(len(rows), -1, dim), [heads, heads + kv_heads], axis=1)
    q, k = turned(normed(q, layer.q_norm), layer), turned(normed(k, layer.k_norm), layer)
    k, v = (np.repeat(rounded(x, layer.cache).astype(np.float64), heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * layer.scale
    if layer.softcap:
        scores = layer.softcap * np.tanh(scores / layer.softcap)
    distance = np.arange(len(rows))[:, None] - np.arange(len(rows))
    seen = (distance >= 0) & (distance < (layer.window or len(rows)))
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(len(rows), -1)


def tolerance(layer: Layer) -> float:
    """How far a result may be from float64's, values being of order 1."""
    if layer.cache == "bf16":  # a rounding of k may fall the other way; queries may be bfloat16 too
        return 4e-2 if layer.isa == "avx512bf16" else 1e-2
    return 3e-2 if layer.cache == "int8" else 1e-5


def frequencies(rotary: int) -> NDArray[np.float32]:
    return (10000.0 ** (-np.arange(0, rotary, 2) / rotary)).astype(np.float32)


@pytest.mark.parametrize(("isa", "cache"), list(product(ISAS, CACHE)))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (4, 4, 20), (8, 1, 80), (14, 2, 64), (3, 1, 96), (2, 2, 128), (2, 1, 256)],
)
def test_prompt_then_decode(isa: str, cache: str, heads: int, kv_heads: int, dim: int) -> None:
    layer = Layer(heads, kv_heads, dim, cache, isa, inv_freq=frequencies(dim))
    rows = make_rows(layer, 150)
    machine = Machine(layer)
    got = [machine.step({0: rows[a:b]})[0] for a, b in [(0, 137), (137, 138), (138, 150)]]
    np.testing.assert_allclose(np.concatenate(got), expected(layer, rows), atol=tolerance(layer), rtol=0)


@pytest.mark.parametrize(("isa", "cache"), list(product(ISAS, CACHE)))
@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 3.0},
        {"softcap": 50.0, "window": 20},
        {"window": 1},
        {"window": 140},
        {"inv_freq": frequencies(16)},
        {"inv_freq": frequencies(32), "interleaved": True, "factor": 1.3},
        {"inv_freq": frequencies(32), "q_norm": np.linspace(0.5, 2, 32, dtype=np.float32),
         "k_norm": np.linspace(2, 0.5, 32, dtype=np.float32)},
        {"q_norm": np.linspace(0.5, 2, 192, dtype=np.float32), "k_norm": np.linspace(2, 0.5, 64, dtype=np.float32)},
    ],
    ids=["softcap", "softcap-window", "window-1", "window-140", "partial", "interleaved", "norm", "wide-norm"],
)  # fmt: skip
def test_variants(isa: str, cache: str, change: dict[str, Any]) -> None:
    layer = replace(Layer(cache=cache, isa=isa), **change)
    rows = make_rows(layer, 300)
    machine = Machine(layer)
    got = np.concatenate([machine.step({0: rows[:290]})[0], machine.step({0: rows[290:]})[0]])
    np.testing.assert_allclose(got, expected(layer, rows), atol=tolerance(layer), rtol=0)


@pytest.mark.parametrize(("isa", "cache"), list(product(ISAS, CACHE)))
@pytest.mark.parametrize("window", [0, 100])
def test_bits_do_not_depend_on_batch_chunking_or_threads(isa: str, cache: str, window: int) -> None:
    layer = Layer(6, 2, 32, cache, isa, window=window, inv_freq=frequencies(32))
    rows = make_rows(layer, 430)
    machine = Machine(layer)
    alone = np.concatenate([machine.step({0: rows[t : t + 1]})[0] for t in range(len(rows))])
    rng = np.random.default_rng(3)
    merged = False
    for threads in (1, 2, 5, 16):
        machine = Machine(replace(layer, threads=threads), blocks=128)
        got: list[NDArray[np.float32]] = []
        at = 0
        while at < len(rows):
            count = int(rng.choice([1, 1, 7, 64, 200]))
            others = {s: make_rows(layer, int(rng.integers(1, 30)), s) for s in range(1, int(rng.integers(1, 4)))}
            got.append(machine.step({**others, 0: rows[at : at + count]})[0])
            at += count
            merged |= machine.merged
        np.testing.assert_array_equal(np.concatenate(got), alone)
    assert merged  # some step was split inside a sequence


@pytest.mark.parametrize(("isa", "cache"), list(product(ISAS, CACHE)))
def test_what_a_block_held_before_does_not_matter(isa: str, cache: str) -> None:
    layer = Layer(cache=cache, isa=isa)
    rows = make_rows(layer, 40)
    clean = Machine(layer)
    used = Machine(layer)
    used.step({7: make_rows(layer, 64 * BLOCK, 9) * 1e6})
    used.free = used.tables.pop(7)
    del used.lengths[7]
    for a, b in [(0, 21), (21, 22), (22, 40)]:
        np.testing.assert_array_equal(used.step({0: rows[a:b]})[0], clean.step({0: rows[a:b]})[0])


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_stay_finite(isa: str) -> None:
    layer = Layer(isa=isa)
    rows = make_rows(layer, 200) * 60
    np.testing.assert_allclose(Machine(layer).step({0: rows})[0], expected(layer, rows), atol=0.1, rtol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_angles_of_far_positions(isa: str) -> None:
    """v = 1 and one position seen: rotation shows in the cache alone, so read q back through a lone key."""
    layer = Layer(1, 1, 16, "fp32", isa, inv_freq=frequencies(16))
    rows = np.ones((2000, 48), np.float32)
    machine = Machine(layer, blocks=128)
    machine.step({0: rows})
    table = machine.tables[0]
    tiles = machine.memory.view(np.float32).reshape(128, 2, 16, 16)
    position = 1987
    key = tiles[table[position // BLOCK], 0, :, position % BLOCK]
    angle = (np.float32(position) * frequencies(16)).astype(np.float64)
    turned_ones = np.concatenate([np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)])
    np.testing.assert_allclose(key, turned_ones, atol=2e-7, rtol=0)
