"""Speculation changes no answer, whoever guesses, under every control and any pressure; and it knows when to stop."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from miaotui.backends.ops import StepShape
from miaotui.engine.draft import DraftProposer, check_same_tokens
from miaotui.engine.engine import Engine
from miaotui.engine.ngram import History, NgramProposer
from miaotui.engine.pace import Odds, Pace
from miaotui.engine.params import BeamSearchParams, SamplingParams, StructuredOutputs
from miaotui.engine.request import RequestOutput
from miaotui.engine.speculate import SpeculativeConfig, Speculator
from miaotui.errors import UsageError
from tests.engine.test_sampler import assert_drawn_from, direct
from tests.engine.toys import (
    EOS,
    EagerSpeculator,
    Scatterbrain,
    ToyExecutor,
    eager,
    finish,
    history_logits,
    naive_greedy,
    toy_engine,
    toy_tokenizer,
)

VOCAB = 5
"""So few that what stood there before often comes again."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def guessing(kind: str, *, seqs: int = 8, blocks: int = 64, vocab: int = VOCAB, rows: int | None = None) -> Any:
    """A speculator of that kind that always guesses."""
    if kind == "ngram":
        return eager(5)
    shape = StepShape(max_tokens=48 if seqs < 64 else 512, max_seqs=seqs, max_logits_rows=seqs, max_model_len=200)
    sort = {"twin": ToyExecutor, "scatterbrain": Scatterbrain}[kind]
    return eager(4, sort(shape, vocab), blocks, vocab)


KINDS = ["ngram", "twin", "scatterbrain"]


def engine_of(kind: str | None, *, vocab: int = VOCAB, seqs: int = 8, blocks: int = 64, **options: Any) -> Engine:
    speculator = None if kind is None else guessing(kind, seqs=seqs, blocks=blocks, vocab=vocab)
    options = {"rows": 6 * seqs, "max_model_len": 200, "budget": 256, **options}
    return toy_engine(vocab=vocab, seqs=seqs, blocks=blocks, speculator=speculator, **options)


def check_lines(engine: Engine) -> None:
    speculator = engine._speculator
    if speculator is not None and isinstance(speculator._proposer, DraftProposer):
        speculator._proposer.check_integrity()


def run(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    ids = [engine.add_request(prompt, params) for prompt, params in asked]
    done: dict[str, RequestOutput] = {}
    while engine.has_work:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
        check_lines(engine)
    assert engine.stats.blocks_in_use == 0
    return [done[i] for i in ids]


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(count)
    shared = [rng.randrange(VOCAB) for _ in range(40)]
    return [
        shared[: rng.randrange(41)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, longest))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 7, 256])
@pytest.mark.parametrize(("seqs", "blocks", "rows"), [(1, 64, None), (4, 64, 5), (8, 11, None)])
def test_greedy_is_the_naive_loop(kind: str, budget: int, seqs: int, blocks: int, rows: int | None) -> None:
    engine = engine_of(kind, budget=budget, seqs=seqs, blocks=blocks, rows=rows or 6 * seqs)
    asked = prompts(6 if budget > 1 else 3)
    for _ in range(2):  # the second time with prefixes
        for output, prompt in zip(run(engine, [(p, GREEDY) for p in asked]), asked, strict=True):
            assert output.outputs[0].token_ids == naive_greedy(prompt, 40, VOCAB)
    stats = engine.stats
    assert budget == 1 or stats.tokens_drafted >= stats.drafts_accepted > 0
    assert stats.drafts <= stats.tokens_drafted
    assert sum(stats.accepted_by_position) == stats.drafts_accepted
    places = [stats.drafts, *stats.accepted_by_position]
    assert places == sorted(places, reverse=True)
    if budget > 1 and kind == "twin" and seqs == 1:
        assert stats.drafts_accepted > 0.9 * stats.tokens_drafted
        assert stats.steps < 0.4 * stats.generated_tokens
    if blocks == 11 and budget == 256:
        assert stats.preemptions > 0


CONTROLS: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7, "min_p": 0.1},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.2, "logprobs": 1},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 1.0, "presence_penalty": -0.5},
    {"temperature": 0.0, "logit_bias": {3: 1.0, 1: -2.0}},
    {"temperature": 1.0, "bad_words": ["!$", "#", "beyond"]},
    {"temperature": 0.7, "allowed_token_ids": [1, 2, 4]},
    {"temperature": 0.0, "stop_token_ids": [2], "min_tokens": 9},
    {"temperature": 1.0, "stop_token_ids": [4]},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.0, "n": 2},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 0.0, "max_tokens": 1},
    {"temperature": 0.0, "max_tokens": 2},
    {"temperature": 0.9, "max_tokens": None},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_every_control_gives_what_it_gives_without(kind: str, controls: dict[str, Any]) -> None:
    """Token for token, the drawn ones too: a seed means the same answer, guessed at or not."""
    params = SamplingParams(**{"max_tokens": 30, "seed": 7, **controls})
    asked = [(prompt, params) for prompt in prompts(4, 20)]
    plain, guessed = run(engine_of(None), asked), run(engine_of(kind), asked)
    for one, other in zip(plain, guessed, strict=True):
        assert one.outputs == other.outputs
        assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_where_they_do_without(kind: str, stream: bool) -> None:
    letters = "abcde"
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, stop=["bcd", "ee"], include_stop_str_in_output=True)

    def told(engine: Engine) -> tuple[str, list[int], Any]:
        allowed = SamplingParams(**{**vars(params), "allowed_token_ids": engine.tokenizer.encode(letters)})
        engine.add_request("abcab", allowed, stream=stream)
        text, tokens, last = "", [], None
        while engine.has_work:
            for output in engine.step():
                last = output.outputs[0]
                text, tokens = text + last.text, tokens + last.token_ids
        assert last is not None
        return text, tokens, (last.finish_reason, last.stop_reason)

    wanted = told(engine_of(None, vocab=260))
    assert wanted[2][1] in ("bcd", "ee")
    engine = engine_of(kind, vocab=260)
    assert told(engine) == wanted
    assert engine.stats.blocks_in_use == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_is_kept(kind: str) -> None:
    pytest.importorskip("llguidance", reason="structured outputs need llguidance")
    wanted = StructuredOutputs(regex="(ab|cd){10,20}")
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=50, structured_outputs=wanted)
    plain = engine_of(None, vocab=260, eos=(EOS,))
    guessed = engine_of(kind, vocab=260, eos=(EOS,))
    asked = [(plain.tokenizer.encode("abcd"), params)]
    assert run(plain, asked)[0].outputs == run(guessed, asked)[0].outputs
    assert guessed.stats.tokens_drafted > 0


def test_beams_are_left_alone() -> None:
    plain, guessed = engine_of(None), engine_of("ngram")
    found = []
    for engine in (plain, guessed):
        request = engine.add_request([1, 2, 1, 2, 1], BeamSearchParams(3, 20))
        found.append([o.token_ids for o in finish(engine)[request].outputs])
    assert found[0] == found[1]
    assert guessed.stats.tokens_drafted == 0


def test_streams_get_several_tokens_at_once() -> None:
    engine = engine_of("twin")
    engine.add_request([1, 2, 3], GREEDY, stream=True)
    tokens: list[int] = []
    sizes = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.outputs[0].token_ids
            sizes.append(len(output.outputs[0].token_ids))
    assert tokens == naive_greedy([1, 2, 3], 40, VOCAB)
    assert max(sizes) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("controls", [{}, {"temperature": 1.6, "top_k": 4}, {"top_p": 0.8}], ids=str)
def test_draws_have_the_distribution_of_draws_without(kind: str, controls: dict[str, Any]) -> None:
    """Chi-square of the tokens that follow one and the same history, where most of them were guessed at."""
    engine = engine_of(kind, seqs=64, blocks=512)
    base = SamplingParams(max_tokens=6, **controls)
    asked = [([2, 1, 2, 1, 2, 1], SamplingParams(**{**vars(base), "seed": seed})) for seed in range(1500)]
    outputs = [output.outputs[0].token_ids for output in run(engine, asked)]
    assert engine.stats.tokens_drafted > 3000
    by_history: dict[tuple[int, ...], list[int]] = {}
    for tokens in outputs:
        for end in range(1, len(tokens)):
            by_history.setdefault(tuple(tokens[:end]), []).append(tokens[end])
    common = [history for history, drawn in by_history.items() if len(drawn) >= 150]
    assert len(common) >= 5
    for history in common:
        logits = history_logits([2, 1, 2, 1, 2, 1, *history], VOCAB).tolist()
        assert_drawn_from(by_history[history], direct(logits, base))


def test_cancelling_forgets_guesses() -> None:
    engine = engine_of("twin")
    requests = [engine.add_request([i, 1, 2], GREEDY) for i in range(4)]
    for _ in range(3):
        engine.step()
    for request in requests:
        engine.cancel(request)
        engine.check_integrity()
        check_lines(engine)
    assert isinstance(engine._speculator, EagerSpeculator)
    assert not engine._speculator._records
    assert not engine._speculator._proposer._lines


def test_a_draft_model_with_less_context_stops_guessing() -> None:
    shape = StepShape(max_tokens=48, max_seqs=8, max_logits_rows=8, max_model_len=32)
    engine = engine_of(None)
    engine._speculator = eager(4, ToyExecutor(shape, VOCAB), 64, VOCAB)
    (output,) = run(engine, [([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=60))])
    assert output.outputs[0].token_ids == naive_greedy([1, 2, 3], 60, VOCAB)
    assert 20 < engine.stats.drafts_accepted < 32


def test_a_draft_models_extra_tokens_are_not_proposed() -> None:
    shape = StepShape(max_tokens=48, max_seqs=8, max_logits_rows=8, max_model_len=200)
    engine = engine_of(None)
    engine._speculator = eager(4, ToyExecutor(shape, 300), 64, VOCAB)
    (output,) = run(engine, [([1, 2, 3], GREEDY)])
    assert output.outputs[0].token_ids == naive_greedy([1, 2, 3], 40, VOCAB)


def test_tokenizers_are_compared() -> None:
    check_same_tokens(toy_tokenizer(), toy_tokenizer(), "draft")
    other = toy_tokenizer()
    other.backend.add_tokens(["new"])
    with pytest.raises(UsageError, match=r"draft has another tokenizer: token 257 is 'new'"):
        check_same_tokens(other, toy_tokenizer(), "draft")


# -- look-up ---------------------------------------------------------------------------------------------


def longest_repeat(tokens: list[int], least: int, most: int) -> int:
    """The length of the longest ending, up to `most`, that stood there before; 0 below `least`."""
    for length in range(most, least - 1, -1):
        ending = tokens[len(tokens) - length :]
        if any(tokens[i : i + length] == ending for i in range(len(tokens) - length)):
            return length
    return 0


@pytest.mark.parametrize("seed", range(20))
def test_look_up_finds_the_longest_of_the_latest(seed: int) -> None:
    rng = random.Random(seed)
    tokens = array("i", [rng.randrange(2 + seed) for _ in range(3)])
    history = History(tokens)
    for _ in range(80):
        tokens.append(rng.randrange(2 + seed))
        match = history.match(2, 6)
        wanted = longest_repeat(tokens.tolist(), 2, 6)
        assert (match is not None) == (wanted > 0)
        if match is not None:
            ending = tokens[len(tokens) - match.length :]
            assert tokens[match.position - match.length : match.position] == ending
            assert match.position < len(tokens)
            assert seed < 5 or match.length == wanted, "only so many places are compared"


def test_a_repetition_goes_on() -> None:
    engine = engine_of("ngram")
    engine.add_request([3, 1, 2, 1, 2], SamplingParams(temperature=0.0, max_tokens=20))
    engine.step()
    (sequence,) = engine._scheduler.running
    del sequence.tokens[5:]
    proposer = NgramProposer(2, 8)
    assert proposer.offer(sequence, 5) == (2, 5)
    assert proposer.propose({sequence: 5}) == {sequence: [1, 2, 1, 2, 1]}


# -- when it pays ----------------------------------------------------------------------------------------


class FixedPace:
    """Steps of known times."""

    scale = 1.0

    def __init__(self, base: float, row: float) -> None:
        self.base, self.row = base, row

    def __call__(self, rows: int) -> float:
        return self.base + self.row * rows

    def observe(self, rows: int, seconds: float) -> None:
        pass


@pytest.mark.parametrize(("row", "least", "most"), [(0.001, 0.5, 1.0), (10.0, 0.0, 0.05)])
def test_it_stops_where_it_loses(row: float, least: float, most: float) -> None:
    """Where rows cost nothing it guesses at almost every step; where they cost everything only to try again."""
    speculator = Speculator(NgramProposer(2, 8), SpeculativeConfig(4))
    speculator._pace = FixedPace(1.0, row)  # type: ignore[assignment]
    engine = toy_engine(vocab=VOCAB, rows=64, max_model_len=512, blocks=64, speculator=speculator)
    engine.add_request([1, 2] * 8, SamplingParams(max_tokens=400, seed=1))
    finish(engine)
    stats = engine.stats
    assert least <= stats.tokens_drafted / stats.steps
    assert most == 1.0 or stats.tokens_drafted / stats.steps <= most


def test_requests_are_told_apart() -> None:
    """One whose guesses come true keeps being guessed at beside one whose do not."""
    speculator = Speculator(NgramProposer(2, 8), SpeculativeConfig(4))
    speculator._pace = FixedPace(2.0, 1.0)  # type: ignore[assignment]
    engine = toy_engine(vocab=VOCAB, rows=64, max_model_len=512, blocks=64, speculator=speculator)
    repeats = engine.add_request([1], SamplingParams(max_tokens=200, allowed_token_ids=[3]))
    wanders = engine.add_request([1, 2] * 8, SamplingParams(max_tokens=200, seed=1))
    drafted: dict[str, int] = {repeats: 0, wanders: 0}
    original = speculator.judge

    def judge(sequence: Any, proposed: int, accepted: int) -> None:
        drafted[sequence.request.id] += proposed
        original(sequence, proposed, accepted)

    speculator.judge = judge  # type: ignore[method-assign]
    finish(engine)
    assert drafted[repeats] > 100
    assert drafted[wanders] < drafted[repeats] / 2


def test_a_costly_draft_model_is_not_asked() -> None:
    shape = StepShape(max_tokens=48, max_seqs=8, max_logits_rows=8, max_model_len=200)
    for cost, drafted in ((0.1, True), (50.0, False)):
        proposer = DraftProposer(ToyExecutor(shape, VOCAB), 64, VOCAB)
        speculator = Speculator(proposer, SpeculativeConfig(4, model="m"))
        speculator._pace = FixedPace(1.0, 0.01)  # type: ignore[assignment]
        engine = toy_engine(vocab=VOCAB, rows=64, max_model_len=200, blocks=64, speculator=speculator)
        engine.add_request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=100))
        while engine.has_work:
            proposer.cost = cost
            engine.step()
        assert (engine.stats.tokens_drafted > 30) == drafted
        assert engine.stats.tokens_drafted > 0, "it is tried now and then"


# -- settings --------------------------------------------------------------------------------------------


def test_settings() -> None:
    assert SpeculativeConfig.parse(None) is None
    assert SpeculativeConfig.parse("ngram") == SpeculativeConfig(8)
    assert SpeculativeConfig.parse({"num_speculative_tokens": 3, "prompt_lookup_max": 4}) == SpeculativeConfig(
        3, prompt_lookup_max=4
    )
    assert SpeculativeConfig.parse('{"method": "ngram", "prompt_lookup_min": 3}') == SpeculativeConfig(
        8, prompt_lookup_min=3
    )
    assert SpeculativeConfig.parse('{"model": "small"}') == SpeculativeConfig(4, model="small")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("eagle", "neither a method nor JSON"),
        ("[1]", "neither a method nor JSON"),
        ({"method": "eagle"}, "method is 'eagle'"),
        ({"method": "draft_model"}, "has no model"),
        ({"model": 7}, "model is 7"),
        ({"method": "ngram", "model": "m"}, "ngram knows no setting 'model'"),
        ({"model": "m", "prompt_lookup_max": 3}, "draft_model knows no setting 'prompt_lookup_max'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True"),
        ({"prompt_lookup_min": 1}, "find nothing"),
        ({"prompt_lookup_min": 9}, "find nothing"),
        ({"depth": 3}, "knows no setting 'depth'"),
    ],
)
def test_wrong_settings_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SpeculativeConfig.parse(given)


def test_logits_are_only_wanted_where_drafts_are() -> None:
    """A step's rows: one for each sequence, and one for each guess."""
    engine = engine_of("twin", seqs=2)
    shapes = []
    original = engine.executor.run

    def spy(step: Any) -> np.ndarray:
        shapes.append((len(step.tokens), len(step.logits_rows)))
        return original(step)

    engine.executor.run = spy  # type: ignore[method-assign]
    run(engine, [([1, 2, 3], GREEDY), ([3, 2], GREEDY)])
    assert shapes[0] == (5, 2)
    assert (10, 10) in shapes
    assert all(rows == tokens for tokens, rows in shapes[1:])


# -- measured times --------------------------------------------------------------------------------------


def observed(pace: Pace, seconds: Callable[[int], float], sizes: list[int], times: int = 40) -> Pace:
    for _ in range(times):
        for rows in sizes:
            pace.observe(rows, seconds(rows))
    return pace


def test_times_are_learnt_by_size() -> None:
    """A kernel's jump between two sizes is seen; what lies between measured sizes is between their times."""

    def seconds(rows: int) -> float:
        return (1.0 if rows <= 4 else 2.0) + 0.01 * rows

    pace = observed(Pace(), seconds, [1, 4, 5, 9])
    for rows in (1, 4, 5, 9):
        assert pace(rows) / pace(1) == pytest.approx(seconds(rows) / seconds(1), rel=0.02)
    assert pace(4) < pace(2) + 0.1 < pace(7)
    assert pace(9) < pace(12) < 1.2 * pace(9), "larger steps are worth a try"
    assert pace.scale * pace(1) == pytest.approx(seconds(1), rel=0.02)


def test_a_slower_machine_leaves_the_shape() -> None:
    pace = observed(Pace(), lambda rows: 1.0 + 0.2 * rows, [1, 3, 5], 150)
    before = pace(5) / pace(1)
    observed(pace, lambda rows: 3.0, [1], 300)
    assert pace(5) / pace(1) == pytest.approx(before, rel=0.1)
    assert pace.scale * pace(1) == pytest.approx(3.0, rel=0.1)


def test_a_hiccup_is_forgotten() -> None:
    pace = observed(Pace(), lambda rows: 1.0 + 0.1 * rows, [1, 2, 4])
    pace.observe(2, 500.0)
    assert pace(2) <= pace(4)
    observed(pace, lambda rows: 1.0 + 0.1 * rows, [1, 2], 40)
    assert pace(2) / pace(1) == pytest.approx(1.2 / 1.1, rel=0.05)


def test_the_first_step_of_a_size_is_not_counted() -> None:
    pace = observed(Pace(), lambda rows: 1.0, [1])
    pace.observe(2, 100.0)
    assert pace(2) < 1.1 * pace(1)
    pace.observe(2, 1.0)
    assert pace(2) == pytest.approx(pace(1), rel=0.05)


def test_many_rows_share_their_measurements() -> None:
    pace = observed(Pace(), lambda rows: 0.1 * rows, [64, 128])
    assert pace(66) == pace(64)
    assert pace(64) < pace(90) < pace(128)


def test_odds_lean_on_all_requests_and_then_on_their_own() -> None:
    everyone = Odds()
    assert 0 < everyone.first("a") < everyone.next("a") < 1
    lucky, unlucky = Odds(everyone), Odds(everyone)
    for _ in range(60):
        lucky.judge("a", 4, 4)
        unlucky.judge("a", 4, 0)
    assert lucky.first("a") > 0.9 < lucky.next("a")
    assert unlucky.first("a") < 0.1
    assert Odds(everyone).first("a") == pytest.approx(0.5, abs=0.1)
    assert lucky.first("b") == Odds().first("b"), "kinds are told apart"
    half = Odds()
    for _ in range(400):
        half.judge("a", 4, 2)
    assert half.first("a") > 0.95
    assert half.next("a") == pytest.approx(0.5, abs=0.05)
