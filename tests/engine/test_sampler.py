"""Draws have the distribution that the parameters say, and depend on nothing but seed, index and position."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from miaotui.engine.draws import draw, keep, likeliest, score
from miaotui.engine.params import SamplingParams
from miaotui.engine.sampler import mix, uniform
from tests.engine.toys import finish, history_logits, toy_engine

DRAWS = 4000
CONTROLS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_k": -1},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"top_k": 12, "top_p": 0.7},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
]


def direct(logits: list[float], params: SamplingParams) -> list[float]:
    """The distribution, slowly: temperature, then min-p, then top-k, then top-p, each on what the one before left."""
    weights = {i: math.exp(x / params.temperature) for i, x in enumerate(logits)}
    peak = max(weights.values())
    weights = {i: w for i, w in weights.items() if w >= params.min_p * peak}
    order = sorted(weights, key=lambda i: -weights[i])
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if mass >= params.top_p * total:
            break
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


def assert_drawn_from(tokens: list[int], probabilities: list[float]) -> None:
    """Chi-square, at a level that a right sampler with these fixed seeds passes and a wrong one does not."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    expected = np.array(probabilities) * len(tokens)
    assert counts[expected == 0].sum() == 0, "a token was drawn that was ruled out"
    often = expected >= 5
    rare = (expected > 0) & ~often
    seen = [*counts[often], counts[rare].sum()]
    wanted = [*expected[often], expected[rare].sum()]
    if wanted[-1] < 1:
        seen, wanted = seen[:-1], wanted[:-1]
    wanted = np.array(wanted) * (sum(seen) / sum(wanted))
    assert len(seen) == 1 or stats.chisquare(seen, wanted).pvalue > 1e-3


@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_draws_have_the_direct_distribution(controls: dict[str, float]) -> None:
    params = SamplingParams(**controls)  # type: ignore[arg-type]
    row = history_logits([4, 2], vocab=40)
    tokens = [draw(row, params, uniform(seed, 0, 2)) for seed in range(DRAWS)]
    assert_drawn_from(tokens, direct(row.tolist(), params))


@pytest.mark.parametrize("controls", CONTROLS[::4], ids=str)
def test_the_engine_draws_the_same(controls: dict[str, float]) -> None:
    params = SamplingParams(**controls)  # type: ignore[arg-type]
    engine = toy_engine(vocab=40, blocks=64)
    many = SamplingParams(**controls, n=300, max_tokens=1, seed=5)  # type: ignore[arg-type]
    tokens = []
    for seed in range(4):
        request = engine.add_request([4, 2], SamplingParams(**{**vars(many), "seed": seed}))
        tokens += [o.token_ids[0] for o in finish(engine, check=False)[request].outputs]
    assert_drawn_from(tokens, direct(history_logits([4, 2], vocab=40).tolist(), params))


def test_uniform_is_what_it_says() -> None:
    """Pinned, for whoever computes it elsewhere; and uniform over seeds, indices and positions alike."""
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "splitmix64's first output from seed 0"
    assert uniform(0, 0, 0) == 0.6524484863740322
    assert uniform(42, 1, 1000) == 0.9863049138180183
    assert uniform(2**64 + 42, 1, 1000) == uniform(42, 1, 1000)
    for values in (
        [uniform(seed, 0, 7) for seed in range(5000)],
        [uniform(7, index, 7) for index in range(5000)],
        [uniform(7, 0, position) for position in range(5000)],
    ):
        assert stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary(top_p: float) -> None:
    """Beyond the first look, and with ties, the smallest nucleus is kept."""
    row = np.round(np.random.default_rng(0).normal(size=5000), 1).astype(np.float32)
    params = SamplingParams(top_p=top_p)
    wanted = [i for i, p in enumerate(direct(row.tolist(), params)) if p > 0]
    kept = keep(np.exp(row - row.max()), params)
    assert kept is not None
    assert kept.tolist() == sorted(kept)
    assert len(set(kept.tolist()) ^ set(wanted)) <= 1, "more than rounding apart"


def test_extreme_draws_stay_inside() -> None:
    row = np.array([0.0, -np.inf, 1.0, -np.inf], np.float32)
    assert draw(row, SamplingParams(), 0.0) == 0
    assert draw(row, SamplingParams(), 1.0 - 2**-53) == 2
    assert draw(row, SamplingParams(temperature=1e-4), 0.5) == 2


@pytest.mark.parametrize("budget", [1, 37, 512])
def test_a_seed_gives_the_same_in_any_batch(budget: int) -> None:
    params = SamplingParams(temperature=1.5, top_k=50, seed=11, max_tokens=12)
    alone = toy_engine()
    request = alone.add_request([5, 6, 7], params)
    wanted = finish(alone)[request].outputs[0].token_ids
    engine = toy_engine(budget=budget, seqs=5, blocks=16)
    asked = [[5, 6, 7] if i % 3 == 0 else [i] * 20 for i in range(12)]
    ids = [engine.add_request(p, params) for p in asked]
    done = finish(engine)
    assert all(done[i].outputs[0].token_ids == wanted for i, p in zip(ids, asked, strict=True) if p == [5, 6, 7])


def test_without_a_seed_answers_differ() -> None:
    engine = toy_engine()
    params = SamplingParams(temperature=5.0, max_tokens=12)
    ids = [engine.add_request([5], params) for _ in range(4)]
    done = finish(engine)
    assert len({tuple(done[i].outputs[0].token_ids) for i in ids}) == 4


def test_logprobs_are_the_models_own() -> None:
    engine = toy_engine()
    params = SamplingParams(temperature=2.0, top_k=3, seed=1, max_tokens=8, logprobs=4, logit_bias={7: 50.0})
    request = engine.add_request([1, 2], params)
    output = finish(engine)[request].outputs[0]
    tokens, total = [1, 2], 0.0
    assert output.logprobs is not None
    for token, found in zip(output.token_ids, output.logprobs, strict=True):
        logits = history_logits(tokens).astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-scores, kind="stable")
        assert set(found) == {token, *best[:4].tolist()}
        for other, entry in found.items():
            assert entry.logprob == pytest.approx(scores[other], abs=1e-6)
            assert entry.rank == int((scores > scores[other]).sum()) + 1
            assert entry.decoded_token == engine.tokenizer.decode([other], skip_special_tokens=False)
        total += scores[token]
        tokens.append(token)
    assert output.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize(("budget", "rows", "blocks"), [(512, None, 256), (9, None, 256), (512, 3, 256), (20, 4, 9)])
def test_prompt_logprobs(budget: int, rows: int | None, blocks: int) -> None:
    engine = toy_engine(budget=budget, rows=rows, blocks=blocks)
    prompt = [(7 * i) % 256 for i in range(40)]
    params = SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=2)
    busy = [engine.add_request([i] * 30, SamplingParams(temperature=0.0, max_tokens=30)) for i in range(2)]
    for _ in range(2):
        again = engine.add_request(prompt, params)
        output = finish(engine)[again]
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for i in range(1, len(prompt)):
            wanted = score(history_logits(prompt[:i]), prompt[i], 2)
            found = output.prompt_logprobs[i]
            assert found is not None
            ranked = {t: (p, r) for r, (t, p) in enumerate(wanted.likeliest, start=1)}
            ranked[prompt[i]] = (wanted.logprob, wanted.rank)
            assert {t: x.rank for t, x in found.items()} == {t: r for t, (_, r) in ranked.items()}
            assert {t: x.logprob for t, x in found.items()} == pytest.approx({t: p for t, (p, _) in ranked.items()})
    assert busy


def test_likeliest_orders_ties_by_id() -> None:
    assert likeliest(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert likeliest(np.array([1.0, 3.0]), 0).tolist() == []
    assert likeliest(np.array([1.0, 3.0]), 9).tolist() == [1, 0]
