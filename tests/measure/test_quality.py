"""Scoring over a toy whose logits depend on all history; then the demo model, against transformers in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from miaotui.backends.ops import StepShape
from miaotui.errors import CheckpointError, MiaotuiError, ResourceError, UsageError
from miaotui.measure import quality, scoring
from miaotui.measure.quality import Reference, compare, evaluate
from miaotui.measure.quality_data import Cut, Window
from miaotui.measure.scoring import Opened, Rows, Scorer, Settings, rows_for
from tests.engine.toys import VOCAB, ToyExecutor, history_logits, naive_greedy, toy_tokenizer

LENGTH = 64


def toy(rows: int = 8, seqs: int = 3, sharpness: float = 3.0) -> Scorer:
    shape = StepShape(max_tokens=rows, max_seqs=seqs, max_logits_rows=rows, max_model_len=LENGTH)
    return Scorer("toy", ToyExecutor(shape, sharpness=sharpness))


def window(tokens: list[int], first: int = 1) -> Window:
    return Window(np.array(tokens, np.int32), first)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


tokens = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=LENGTH)


# -- rows ------------------------------------------------------------------------------------------------
@given(tokens, st.integers(1, 70), st.data())
def test_rows_are_those_of_the_targets_whatever_the_chunks(ids: list[int], rows: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(ids) - 1))
    scorer = toy(rows, seqs=min(3, rows))
    for _ in range(2):  # the cache may hold anything
        found = np.concatenate([logits.copy() for logits in scorer.logits(window(ids, first))])
        assert (found == [history_logits(ids[:at]) for at in range(first, len(ids))]).all()


@given(st.lists(tokens.map(lambda ids: ids[: LENGTH // 2]), min_size=1, max_size=7), st.integers(3, 9))
def test_greedy_of_several_prompts(prompts: list[list[int]], rows: int) -> None:
    answers = toy(rows).greedy([np.array(prompt, np.int32) for prompt in prompts], 9)
    assert [answer.tolist() for answer in answers] == [naive_greedy(prompt, 9) for prompt in prompts]


@given(tokens, st.integers(1, 4))
def test_what_rows_say(ids: list[int], threads: int) -> None:
    targets = np.arange(len(ids) - 1), ids[1:]
    log_p, log_q = (
        log_softmax(np.array([history_logits(ids[:at], sharpness=s) for at in range(1, len(ids))])) for s in (9.0, 8.0)
    )
    with Rows(threads) as rows:
        alone = rows.nll(toy(sharpness=8.0), window(ids))
        found = rows.divergence(toy(sharpness=9.0), toy(sharpness=8.0), window(ids))
        same = rows.divergence(toy(), toy(), window(ids))
    assert alone == pytest.approx(-log_q[targets])
    assert (alone == found.nll).all()
    assert found.reference_nll == pytest.approx(-log_p[targets])
    assert found.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1), abs=1e-12)
    assert (found.flipped == (log_p.argmax(axis=1) != log_q.argmax(axis=1))).all()
    assert not same.kl.any()
    assert not same.flipped.any()


def test_chunks_are_bounded_and_even() -> None:
    assert rows_for(49152, 1024) == 341
    assert rows_for(262_144, 1024) * 262_144 * 4 <= scoring.LOGITS_BYTES
    assert rows_for(1000, 4096) <= scoring.MOST_ROWS
    assert rows_for(10**9, 512) <= scoring.LEAST_ROWS
    assert rows_for(1000, 2) == 1


def test_logits_that_are_no_numbers() -> None:
    with Rows(1) as rows, pytest.raises(MiaotuiError, match="toy gives logits that are not finite"):
        rows.nll(toy(sharpness=np.nan), window([1, 2, 3]))


def test_tokens_that_the_model_has_not() -> None:
    with pytest.raises(CheckpointError, match="token 260"):
        next(toy().logits(window([1, VOCAB])))


def test_a_cache_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miaotui.hardware.detect.available_memory", lambda: 100)
    with pytest.raises(ResourceError, match="free"):
        toy()


# -- reports, over toys ----------------------------------------------------------------------------------
@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Settings]]:
    """MODEL is a sharpness (`blunt` has another vocabulary); what is loaded, and how."""
    loaded: list[tuple[str, Settings]] = []

    def of(model: str) -> Any:
        tokenizer = toy_tokenizer()
        if model == "blunt":
            tokenizer.backend.add_tokens(["<pad>"])
            vocabulary = {**tokenizer.backend.get_vocab(), "!": 1, '"': 0}
            tokenizer = SimpleNamespace(**vars(tokenizer), encode=tokenizer.encode)  # type: ignore[assignment]
            tokenizer.backend = SimpleNamespace(get_vocab=lambda: vocabulary)  # type: ignore[assignment]
        if model == "5.5":
            tokenizer.backend.add_tokens(["[PAD257]"])

        def load(settings: Settings, size: int) -> Scorer:
            loaded.append((model, settings))
            return toy(sharpness=float(model))

        return SimpleNamespace(model=model, tokenizer=tokenizer, render=None, load=load)

    monkeypatch.setattr(quality.Opened, "of", of)
    return loaded


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("Whatever is said, is said in so many words: " * 12)
    return str(file)


def test_the_contract(toys: list[tuple[str, Settings]], text: str) -> None:
    told: list[tuple[int, int]] = []
    report = json.loads(json.dumps(evaluate("6", text, cut=Cut(LENGTH), tell=lambda *at: told.append(at))))
    assert (report["windows"], report["tokens"], report["model"]) == (8, 8 * 63, "6")
    assert report["perplexity_interval"][0] < report["perplexity"] < report["perplexity_interval"][1]
    assert 0 < report["stderr"] < report["perplexity"]
    assert report["settings"]["window"] == LENGTH
    assert report["notes"] == []
    assert "kl_mean" not in report
    assert told == [(63 * i, 8 * 63) for i in range(1, 9)]
    assert toys == [("6", Settings())]


def test_against_a_reference(toys: list[tuple[str, Settings]], text: str) -> None:
    reference = Reference("6", agreement=12)
    settings = Settings(kv_cache_dtype="int8", threads=1)
    report = json.loads(json.dumps(evaluate("5.5", text, cut=Cut(LENGTH), settings=settings, reference=reference)))
    assert toys == [("5.5", settings), ("6", quality.EXACT)]
    for name in ("kl_mean", "kl_p99", "top1_flips", "perplexity_ratio", "nll_difference"):
        low, high = report[f"{name}_interval"]
        assert low <= report[name] <= high, name
        assert report[f"{name}_stderr"] >= 0
    assert report["reference"]["model"] == "6"
    assert report["perplexity_ratio"] == pytest.approx(report["perplexity"] / report["reference"]["perplexity"])
    assert report["kl_mean"] < report["kl_p99"]
    assert (report["greedy_agreement"], report["greedy_tokens"], report["greedy_prompts"]) == (12, 12, 8)
    assert report["top1_flips"] == 0, "sharpness changes no order"


def test_a_model_against_itself(toys: list[tuple[str, Settings]], text: str) -> None:
    report = evaluate("6", text, cut=Cut(LENGTH), reference=Reference("6"))
    assert [report[name] for name in ("kl_mean", "kl_p99", "top1_flips", "perplexity_ratio")] == [0, 0, 0, 1]
    assert report["perplexity_ratio_interval"] == [1, 1]
    assert report["p_value"] == 1.0


def test_comparing(toys: list[tuple[str, Settings]], text: str) -> None:
    told: list[tuple[int, int]] = []
    report = compare(["6", "3"], text, cut=Cut(LENGTH), tell=lambda *at: told.append(at))
    first, second = report["models"]
    assert [first["model"], second["model"]] == ["6", "3"]
    assert first == {"model": "6"} | {k: v for k, v in evaluate("6", text, cut=Cut(LENGTH)).items() if k in first} | {
        "model": "6"
    }
    assert report["perplexity_ratio"] == pytest.approx(second["perplexity"] / first["perplexity"])
    assert report["perplexity_ratio"] < 1
    assert report["p_value"] < 0.01
    assert told[-1] == (16 * 63, 16 * 63)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_one_window_says_so(toys: list[tuple[str, Settings]], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A short text.")
    report = evaluate("6", str(tmp_path / "short.txt"), cut=Cut(LENGTH))
    assert (report["windows"], report["tokens"]) == (1, 12)
    assert "one short window" in report["notes"][0]
    assert "One window only" in report["notes"][1]
    assert report["stderr"] > 0


def test_other_vocabularies_are_refused_and_padding_is_not(toys: list[tuple[str, Settings]], text: str) -> None:
    for run in (
        lambda: evaluate("6", text, reference=Reference("blunt")),
        lambda: compare(["6", "blunt"], text),
    ):
        with pytest.raises(UsageError, match="different vocabularies: token 0 is"):
            run()
    assert toys == []
    assert compare(["6", "5.5"], text, cut=Cut(LENGTH))["windows"] == 8


def test_greedy_tokens_that_do_not_fit(toys: list[tuple[str, Settings]], text: str) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        evaluate("6", text, cut=Cut(LENGTH), reference=Reference("6", agreement=LENGTH))


# -- the demo model --------------------------------------------------------------------------------------
PROSE = (
    "The lighthouse stood at the end of the island, and for forty years the same family had kept its lamp. When the "
    "ships began to carry their own instruments, the council decided that nobody was needed there any longer. The "
    "keeper's daughter wrote to the newspaper, asking who would count the birds that rest on the rocks each spring. "
    "Three weeks later a biologist arrived with two boxes of notebooks and a telescope, and she asked to rent the "
    "upper room. They agreed on a price, on the hours of silence, and on who should carry water from the well. "
) * 2  # fmt: skip
SIZE = 96


@pytest.fixture(scope="module")
def oracle_rows(demo_gguf: Path) -> Callable[[Window], NDArray[np.float64]]:
    """transformers' log-probabilities of a window's targets, `[targets, vocabulary]`, in float32."""
    torch = pytest.importorskip("torch", reason="the reference figures come from PyTorch and transformers")
    pytest.importorskip("transformers", reason="the reference figures come from transformers")
    pytest.importorskip("gguf", reason="transformers reads the file with gguf")
    from tests.golden.greedy import oracle

    model = oracle(demo_gguf)

    @cache
    def rows(window: Window) -> NDArray[np.float64]:
        with torch.inference_mode():
            logits = model(torch.tensor(window.tokens[None].astype(np.int64))).logits[0]
        return log_softmax(logits.numpy()[window.first - 1 : -1])

    return rows


@pytest.fixture(scope="module")
def demo_scorers(demo_gguf: Path) -> Iterator[tuple[Scorer, Scorer]]:
    """The demo model computed exactly, and as it is shipped."""
    opened = Opened.of(str(demo_gguf))
    scorers = opened.load(quality.EXACT, SIZE), opened.load(Settings(), SIZE)
    yield scorers
    for scorer in scorers:
        scorer.close()


@pytest.fixture(scope="module")
def demo_windows(demo_gguf: Path) -> list[Window]:
    ids = np.array(Opened.of(str(demo_gguf)).tokenizer.encode(PROSE), np.int32)
    return [Window(ids[:SIZE]), Window(ids[SIZE : 2 * SIZE], 30)]


def test_perplexity_is_that_of_transformers(
    oracle_rows: Callable[[Window], NDArray[np.float64]],
    demo_scorers: tuple[Scorer, Scorer],
    demo_windows: list[Window],
) -> None:
    with Rows() as rows:
        for one in demo_windows:
            expected = -oracle_rows(one)[np.arange(len(one.targets)), one.targets]
            found = rows.nll(demo_scorers[0], one)
            assert found == pytest.approx(expected, abs=2e-3)
            assert np.exp(found.mean()) == pytest.approx(np.exp(expected.mean()), rel=2e-4)


def test_divergence_is_that_of_direct_computation(
    oracle_rows: Callable[[Window], NDArray[np.float64]],
    demo_scorers: tuple[Scorer, Scorer],
    demo_windows: list[Window],
) -> None:
    exact, shipped = demo_scorers
    with Rows() as rows:
        for one in demo_windows:
            found = rows.divergence(exact, shipped, one)
            log_q = log_softmax(np.concatenate([logits.copy() for logits in shipped.logits(one)]))
            ours = log_softmax(np.concatenate([logits.copy() for logits in exact.logits(one)]))
            theirs = oracle_rows(one)
            direct = (np.exp(ours) * (ours - log_q)).sum(axis=1)
            assert found.kl == pytest.approx(direct, rel=1e-6, abs=1e-12)
            against_theirs = (np.exp(theirs) * (theirs - log_q)).sum(axis=1)
            assert found.kl.mean() == pytest.approx(against_theirs.mean(), rel=0.02)
            assert np.quantile(found.kl, 0.99) == pytest.approx(np.quantile(against_theirs, 0.99), rel=0.02)
            assert found.kl.mean() > 1e-5, "there is something to measure"


def test_agreement_is_that_of_real_answers(
    demo_gguf: Path, demo_scorers: tuple[Scorer, Scorer], demo_windows: list[Window]
) -> None:
    from miaotui import LLM, SamplingParams

    count = SIZE - 24
    prompts = [one.tokens[:24].tolist() for one in demo_windows]
    answers = []
    for options in ({"compute": "fp32", "kv_cache_dtype": "fp32"}, {}):
        with LLM(str(demo_gguf), max_model_len=SIZE, **options) as llm:  # type: ignore[arg-type]
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    equal = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), count)
        for pair in zip(*answers, strict=True)
    ]
    with Rows() as rows:
        found = quality.agreement(rows, *demo_scorers, demo_windows, count)
    assert found.value == np.mean(equal)


def test_the_reference_backend_gives_the_same(demo_gguf: Path, demo_windows: list[Window]) -> None:
    pytest.importorskip("torch", reason="--device reference runs on PyTorch")
    (short,) = (Window(demo_windows[0].tokens[:20]),)
    opened = Opened.of(str(demo_gguf))
    found = []
    with Rows() as rows:
        for device in ("reference", "cpu"):
            scorer = opened.load(Settings(device, "fp32", "fp32"), 20)
            found.append(rows.nll(scorer, short))
            scorer.close()
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_a_window_that_the_model_does_not_reach(demo_gguf: Path) -> None:
    with pytest.raises(UsageError, match="longer than"):
        Opened.of(str(demo_gguf)).load(Settings(), 1 << 20)
