"""The least work of a step, against sums written out by hand and against transformers' parameter count."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miaotui.backends.ops import FEW_ROWS, Attention
from miaotui.hardware.ceilings import Ceilings
from miaotui.measure.work import Cost, parameters_read
from miaotui.model.spec import ExpertsSpec, LayerSpec, ModelSpec


def make_spec(window: int | None = None, experts: ExpertsSpec | None = None, layers: int = 2) -> ModelSpec:
    attention = Attention(heads=4, kv_heads=2, head_dim=8, scale=1.0, rope=None, window=window)
    return ModelSpec(
        family="llama", vocab_size=100, hidden_size=32, intermediate_size=48, max_position=512,
        layers=tuple(LayerSpec(attention, experts) for _ in range(layers)), activation="silu", norm_eps=1e-5,
    )  # fmt: skip


LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
KEYS_AND_VALUES = 2 * 32 * 16
HEAD = 100 * 32
LIMITS = Ceilings(threads=2, working_set=1, bandwidth=1e9, int8=1e10, fp32=1e9)


def test_parameters() -> None:
    assert parameters_read(make_spec()) == 2 * LAYER + HEAD


def test_parameters_of_a_tiny_llama_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n)
    assert parameters_read(make_spec()) == matrices


def test_experts_count_only_the_chosen() -> None:
    spec = make_spec(experts=ExpertsSpec(count=8, top_k=2, width=16, normalise=True))
    mlp = 2 * 3 * 32 * 16 + 8 * 32
    assert parameters_read(spec) == 2 * (LAYER - 3 * 32 * 48 + mlp) + HEAD


def test_a_decode_step() -> None:
    cost = Cost.of(make_spec(), weight_bytes=10_000, block_bytes=16 * 256, compute="auto")
    work = cost.step([10, 20])
    assert work.bytes == 10_000 + 256 * (9 + 19)
    assert (work.linear_operations, work.head_operations) == (2 * 2 * 2 * LAYER, 2 * 2 * HEAD)
    assert work.attention_operations == 2 * 4 * 4 * 8 * (10 + 20)


def test_a_greedy_step_of_few_rows_reads_less() -> None:
    cost = Cost.of(make_spec(), weight_bytes=10_000, block_bytes=0, compute="auto", greedy_bytes=8_000)
    assert [cost.step([10] * rows).bytes for rows in (1, FEW_ROWS, FEW_ROWS + 1)] == [8_000, 8_000, 10_000]
    assert cost.step([64], new_tokens=64).bytes == 8_000


def test_a_prefill_step_and_a_window() -> None:
    cost = Cost.of(make_spec(window=4), weight_bytes=10_000, block_bytes=16 * 256, compute="auto")
    work = cost.step([6], new_tokens=6)
    assert work.bytes == 10_000
    assert work.linear_operations == 2 * (6 * LAYER + LAYER + 5 * KEYS_AND_VALUES)
    assert work.head_operations == 2 * HEAD
    assert work.attention_operations == 4 * 4 * 8 * ((1 + 2 + 3 + 4 + 4 + 4) + 4)
    assert cost.step([100]).bytes == 10_000 + 256 * 4


def test_the_slower_of_reading_and_computing_limits() -> None:
    spec = make_spec()
    integer = Cost.of(spec, weight_bytes=parameters_read(spec) * 5 // 8, block_bytes=0, compute="auto")
    exact = Cost.of(spec, weight_bytes=parameters_read(spec) * 5 // 8, block_bytes=0, compute="fp32")
    floating = Cost.of(spec, weight_bytes=parameters_read(spec) * 2, block_bytes=0, compute="auto")
    assert (integer.integer, exact.integer, floating.integer) == (True, False, False)
    one = integer.step([1])
    assert integer.seconds(one, LIMITS) == pytest.approx(integer.weight_bytes / 1e9)
    many = integer.step([64], new_tokens=64)
    coded = many.linear_operations + many.head_operations
    assert integer.seconds(many, LIMITS) == pytest.approx(coded / 1e10 + many.attention_operations / 1e9)
    assert exact.seconds(many, LIMITS) == pytest.approx((coded + many.attention_operations) / 1e9)
    apart = replace(integer, integer_head=False)
    longer = many.head_operations * (1 / 1e9 - 1 / 1e10)
    assert apart.seconds(many, LIMITS) - integer.seconds(many, LIMITS) == pytest.approx(longer)
