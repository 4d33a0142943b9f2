"""The reference ops against plain loops, and what the paged cache must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference backend is PyTorch")

from miaotui.backends.ops import Attention, CacheSpec, CacheType, ExpertsWeight, Rope, StepShape  # noqa: E402
from miaotui.backends.reference.backend import ReferenceBackend  # noqa: E402
from miaotui.backends.reference.cache import quantise_heads  # noqa: E402
from miaotui.backends.reference.ops import ReferenceOps, step_tensors  # noqa: E402
from miaotui.backends.reference.weights import quantise_activations  # noqa: E402
from miaotui.errors import DependencyError  # noqa: E402
from miaotui.quant.scheme import QuantScheme  # noqa: E402
from miaotui.quant.tensor import DenseTensor, GroupedTensor  # noqa: E402
from tests.golden.paged import Paged  # noqa: E402

SHAPE = StepShape(max_tokens=64, max_seqs=4, max_logits_rows=64, max_model_len=256)


def attention(**changes: object) -> Attention:
    values: dict[str, object] = {"heads": 6, "kv_heads": 2, "head_dim": 10, "scale": 0.3, "rope": None}
    return Attention(**{**values, **changes})  # type: ignore[arg-type]


def ops(*attentions: Attention, compute: str = "fp32", cache: CacheType = "fp32") -> ReferenceOps:
    backend = ReferenceBackend(SHAPE, CacheSpec(attentions, cache), compute=compute)  # type: ignore[arg-type]
    backend.cache.allocate(33)
    return backend.ops


def dense(*shape: int, seed: int = 0) -> DenseTensor:
    return DenseTensor("float32", np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- activations -----------------------------------------------------------------------------------------
def test_quantised_activations_follow_the_definition() -> None:
    x = random(3, 77) * torch.tensor([1.0, 100.0, 1e-4])[:, None]
    x[1, 32:64] = 0
    found = quantise_activations(x)
    for row, out in zip(x.numpy(), found.numpy(), strict=True):
        for start in range(0, 77, 32):
            group = row[start : start + 32]
            scale = np.float32(np.abs(group).max() / np.float32(127))
            want = np.rint(group / scale) * scale if scale else group
            np.testing.assert_array_equal(out[start : start + 32], want.astype(np.float32))


def test_quantised_activations_are_grouped_in_the_order_of_the_codes() -> None:
    x, perm = random(4, 70), torch.randperm(70, generator=torch.Generator().manual_seed(3))
    found = quantise_activations(x, perm)
    torch.testing.assert_close(found[:, perm], quantise_activations(x[:, perm]), rtol=0, atol=0)


def test_only_integer_weights_quantise_their_input() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (9, 64)).astype(np.uint8)
    scale = np.full((9, 2), 0.125, np.float32)
    grouped = GroupedTensor(QuantScheme(4, 32, symmetric=True), codes, scale)
    plain = DenseTensor("float32", grouped.dense32())
    x = random(5, 64)
    exact, fast = ops(compute="fp32"), ops(compute="auto")
    want = x @ torch.from_numpy(plain.data).T
    assert torch.equal(exact.linear(x, exact.prepare_linear([grouped])), want)
    assert torch.equal(fast.linear(x, fast.prepare_linear([plain])), want)
    rounded = fast.linear(x, fast.prepare_linear([grouped]))
    assert torch.equal(rounded, quantise_activations(x) @ torch.from_numpy(plain.data).T)
    assert not torch.equal(rounded, want)


def test_half_holds_matrices_in_16_bits_and_answers_in_float32() -> None:
    """What `cuda` does with compute auto, on the CPU."""
    o = ReferenceOps(ops(attention()).cache, torch.device("cpu"), quantise=False, half=True)
    codes = np.random.default_rng(1).integers(0, 16, (9, 64)).astype(np.uint8)
    grouped = GroupedTensor(QuantScheme(4, 32, symmetric=True), codes, np.full((9, 2), 0.11, np.float32))
    kinds = {}
    for name, tensor in {
        "float16": DenseTensor("float16", dense(9, 64).data.astype(np.float16)),
        "bfloat16": DenseTensor("bfloat16", (dense(9, 64).data.view(np.uint32) >> 16).astype(np.uint16)),
        "float32": dense(9, 64),
        "grouped": grouped,
    }.items():
        weight = o.prepare_linear([tensor])
        kinds[name] = weight.parts[0].weight.dtype
        x = random(5, 64)
        y = o.linear(x, weight)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, x @ torch.from_numpy(tensor.dense32()).T, rtol=0.02, atol=0.1)
    half, brain = torch.float16, torch.bfloat16
    assert kinds == {"float16": half, "bfloat16": brain, "float32": torch.float32, "grouped": brain}


# -- plain ops -------------------------------------------------------------------------------------------
def test_linear_stacks_adds_and_scales() -> None:
    o = ops()
    a, b = dense(5, 12), dense(3, 12, seed=1)
    bias = np.arange(8, dtype=np.float32)
    x, h = random(4, 12), random(4, 8, seed=2)
    want = h + 0.5 * (x @ torch.from_numpy(np.concatenate([a.data, b.data])).T + torch.from_numpy(bias))
    torch.testing.assert_close(o.linear(x, o.prepare_linear([a, b], bias), add=h, scale=0.5), want)


def test_norms() -> None:
    o = ops()
    x, h = random(4, 12) * 3, random(4, 12, seed=1)
    w, b = dense(12).data, dense(12, seed=1).data
    rms = x.numpy() / np.sqrt((x.numpy() ** 2).mean(1, keepdims=True) + 1e-3) * w
    layer = torch.nn.functional.layer_norm(x, (12,), torch.from_numpy(w), torch.from_numpy(b), 1e-3)
    np.testing.assert_allclose(o.norm(x, o.prepare_norm(w, 1e-3)), rms, rtol=1e-5)
    np.testing.assert_allclose(o.norm(x, o.prepare_norm(w, 1e-3), add=h), h.numpy() + rms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(o.norm(x, o.prepare_norm(w, 1e-3, bias=b, kind="layer")), layer)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu2", lambda x: max(x, 0.0) ** 2),
    ],
)
def test_activations(name: str, function: object) -> None:
    x = random(3, 10)
    want = np.vectorize(function)(x.numpy().astype(float))  # type: ignore[call-overload]
    np.testing.assert_allclose(ops().activate(x, name), want, rtol=2e-5, atol=1e-7)  # type: ignore[arg-type]
    gated = ops().gated(x, name)  # type: ignore[arg-type]
    np.testing.assert_allclose(gated, want[:, :5] * x[:, 5:].numpy(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("normalise", [True, False])
def test_experts_against_a_loop_over_tokens(normalise: bool) -> None:
    o = ops()
    router = dense(5, 12)
    router.data[3] = router.data[1]  # a tie, which the lower index wins
    gate_up, down = [dense(14, 12, seed=i) for i in range(5)], [dense(12, 7, seed=9 + i) for i in range(5)]
    prepare = o.prepare_linear
    weight = ExpertsWeight(prepare([router]), tuple(prepare([w]) for w in gate_up), tuple(prepare([w]) for w in down))
    x, h = random(6, 12), random(6, 12, seed=5)
    want = h.numpy().copy()
    for t in range(6):
        score = np.exp(router.data @ x[t].numpy())
        score /= score.sum()
        best = np.argsort(-score, kind="stable")[:2]
        share = score[best] / (score[best].sum() if normalise else 1)
        for e, p in zip(best, share, strict=True):
            gate, up = np.split(gate_up[e].data @ x[t].numpy(), 2)
            want[t] += p * (down[e].data @ (gate / (1 + np.exp(-gate)) * up))
    found = o.experts(x, weight, "silu", top_k=2, normalise=normalise, add=h)
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-5)


def test_logits_are_scaled_then_capped() -> None:
    o = ops()
    head, x = dense(11, 12), random(3, 12)
    want = 4 * np.tanh(x.numpy() @ head.data.T * 2 / 4)
    np.testing.assert_allclose(o.logits(x, o.prepare_embedding(head), scale=2.0, softcap=4.0), want, rtol=1e-4)
    np.testing.assert_allclose(o.logits(x, o.prepare_linear([head]), scale=2.0, softcap=4.0), want, rtol=1e-4)


# -- attention -------------------------------------------------------------------------------------------
def naive(qkv: np.ndarray, a: Attention, q_norm: np.ndarray | None = None, eps: float = 0.0) -> np.ndarray:
    """One whole sequence, position by position and head by head."""
    count, d = len(qkv), a.head_dim
    q, k, v = np.split(qkv, [a.heads * d, (a.heads + a.kv_heads) * d], axis=1)
    q, k, v = q.reshape(count, -1, d).copy(), k.reshape(count, -1, d).copy(), v.reshape(count, -1, d)
    for x in (q, k):
        if q_norm is not None:
            x[:] = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * q_norm
        if a.rope is not None:
            n = len(a.rope.inv_freq)
            for t in range(count):
                c = np.cos(t * a.rope.inv_freq) * a.rope.factor
                s = np.sin(t * a.rope.inv_freq) * a.rope.factor
                first, second = (
                    (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if a.rope.interleaved else (slice(n), slice(n, 2 * n))
                )
                one, two = x[t, :, first].copy(), x[t, :, second].copy()
                x[t, :, first], x[t, :, second] = one * c - two * s, two * c + one * s
    out = np.zeros((count, a.heads, d))
    for t in range(count):
        low = 0 if a.window is None else max(0, t - a.window + 1)
        for h in range(a.heads):
            scores = k[low : t + 1, h // (a.heads // a.kv_heads)] @ q[t, h] * a.scale
            if a.softcap is not None:
                scores = a.softcap * np.tanh(scores / a.softcap)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ v[low : t + 1, h // (a.heads // a.kv_heads)]
    return out.reshape(count, -1)


FREQUENCIES = (0.8 ** np.arange(5)).astype(np.float32)
ATTENTIONS = [
    attention(),
    attention(rope=Rope(FREQUENCIES)),
    attention(rope=Rope(FREQUENCIES, factor=1.2, interleaved=True)),
    attention(rope=Rope(FREQUENCIES[:3])),
    attention(window=1),
    attention(window=17, softcap=0.7),
    attention(heads=4, kv_heads=4, head_dim=12, rope=Rope(FREQUENCIES)),
]


@pytest.mark.parametrize("a", ATTENTIONS)
@pytest.mark.parametrize("chunks", [(45,), (16, 1, 15, 13), (7,) * 7])
def test_attention_over_the_paged_cache(a: Attention, chunks: tuple[int, ...]) -> None:
    """Two sequences in scattered blocks, in chunks, give what one pass over each gives."""
    o = ops(a)
    width = (a.heads + 2 * a.kv_heads) * a.head_dim
    sequences = [random(45, width, seed=1), random(45, width, seed=2)]
    paged = Paged(2, 45)
    found: list[list[torch.Tensor]] = [[], []]
    for size in chunks:
        spans = [sequence[paged.done[s] : paged.done[s] + size] for s, sequence in enumerate(sequences)]
        step = paged.step([(s, [0] * len(span)) for s, span in enumerate(spans)])
        o.step = step_tensors(step, o.device)
        out = o.attention(o.rope_and_cache(torch.cat(spans), 0, a), 0, a)
        for s, part in enumerate(out.split([len(span) for span in spans])):
            found[s].append(part)
    for parts, sequence in zip(found, sequences, strict=True):
        have = torch.cat(parts)
        np.testing.assert_allclose(have, naive(sequence.numpy(), a)[: len(have)], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("over", ["head", "all heads"])
def test_q_and_k_norm(over: str) -> None:
    a = attention(heads=2, kv_heads=2, rope=Rope(FREQUENCIES))
    o = ops(a)
    qkv = random(9, 60)
    weight = dense(10 if over == "head" else 20).data
    norm = o.prepare_norm(weight, 1e-4)
    o.step = step_tensors(Paged(1, 16).step([(0, [0] * 9)]), o.device)
    found = o.attention(o.rope_and_cache(qkv, 0, a, q_norm=norm, k_norm=norm), 0, a)
    if over == "head":
        want = naive(qkv.numpy(), a, weight, 1e-4)
    else:
        by_hand = qkv.numpy().copy()
        for part in (by_hand[:, :20], by_hand[:, 20:40]):
            part[:] = part / np.sqrt((part**2).mean(1, keepdims=True) + 1e-4) * weight
        want = naive(by_hand, a)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


# -- cache -----------------------------------------------------------------------------------------------
def test_int8_cache_is_within_half_a_code() -> None:
    x = random(7, 3, 20)
    codes, scale = quantise_heads(x)
    assert codes.abs().max() == 127
    assert ((codes * scale[..., None] - x).abs() <= scale[..., None] * 0.5001).all()
    assert (quantise_heads(torch.zeros(1, 1, 4))[0] == 0).all()


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 0.02), ("int8", 0.03)])
def test_smaller_caches_stay_near(kind: CacheType, tolerance: float) -> None:
    a = attention(rope=Rope(FREQUENCIES))
    qkv = random(40, 100)
    out = []
    for o in (ops(a), ops(a, cache=kind)):
        o.step = step_tensors(Paged(1, 40).step([(0, [0] * 40)]), o.device)
        out.append(o.attention(o.rope_and_cache(qkv, 0, a), 0, a))
    assert 0 < (out[0] - out[1]).abs().max() < tolerance * out[0].abs().max()


@pytest.mark.parametrize(("kind", "size"), [("fp32", 80), ("bf16", 40), ("int8", 28)])
def test_block_bytes(kind: CacheType, size: int) -> None:
    backend = ReferenceBackend(SHAPE, CacheSpec((attention(),) * 3, kind), compute="fp32")
    assert backend.cache.block_bytes == 3 * 16 * 2 * size
    backend.cache.allocate(2)
    stores = [store for layer in backend.cache.layers for store in layer]
    tensors = [t for store in stores for t in (store.data, store.scale) if t is not None]
    assert sum(t.numel() * t.element_size() for t in tensors) == 2 * backend.cache.block_bytes


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_copied_blocks_hold_the_same(kind: CacheType) -> None:
    a = attention()
    o = ops(a, a, cache=kind)
    o.step = step_tensors(Paged(1, 32).step([(0, [0] * 32)]), o.device)
    for layer in (0, 1):
        o.rope_and_cache(random(32, 100, seed=layer), layer, a)
    o.cache.copy([(1, 30), (2, 31)])
    o.cache.copy([])
    for keys, values in o.cache.layers:
        for store in (keys, values):
            assert store.data[1].any()
            assert torch.equal(store.data[[1, 2]], store.data[[30, 31]])
            assert store.scale is None or torch.equal(store.scale[[1, 2]], store.scale[[30, 31]])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_with_a_remedy() -> None:
    with pytest.raises(DependencyError, match="--device cpu"):
        ReferenceBackend(SHAPE, CacheSpec(), compute="auto", device="cuda")
