"""What a model's answers are worth: perplexity, and its distance from a reference on the same tokens.

| figure | what it is |
|---|---|
| perplexity | e to the mean -log p of a token, given all before it in its window |
| perplexity_ratio | the model's perplexity ÷ the reference's; its interval is that of the windows' differences |
| kl_mean, kl_p99 | KL(reference ‖ model) in nats, over the whole vocabulary: mean and 99th percentile of tokens |
| top1_flips | the share of tokens at which the two find another token likeliest |
| greedy_agreement | how many greedy tokens after a prompt are the reference's, until the first that is not |

Standard errors take windows, not tokens, as independent (`intervals.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from miaotui.errors import UsageError
from miaotui.measure import intervals
from miaotui.measure.intervals import Estimate, Values
from miaotui.measure.quality_data import Cut, Data, Window, cut_windows, read_data
from miaotui.measure.scoring import Divergence, Opened, Rows, Scorer, Settings
from miaotui.model.tokenizer import Tokenizer

EXACT = Settings(compute="fp32", kv_cache_dtype="fp32")
"""How a reference is run: what was lost is measured from what the weights say."""

AGREEMENT_PROMPTS = 32
PROMPT_TOKENS = 64

Tell = Callable[[int, int], None]
"""Told (tokens done, tokens in all)."""


@dataclass(frozen=True)
class Reference:
    """The model to compare with, how it is run, and how many greedy tokens are compared (0: none)."""

    model: str
    settings: Settings = EXACT
    agreement: int = 0

    def check(self, cut: Cut) -> None:
        """Raise UsageError where a prompt and its greedy tokens are longer than a window."""
        if self.agreement >= cut.size:
            raise UsageError(
                f"{self.agreement} greedy tokens and a prompt do not fit in a window of {cut.size}.",
                "Give a smaller --agreement or a larger --window.",
            )


def evaluate(
    model: str,
    source: str | None,
    *,
    cut: Cut | None = None,
    settings: Settings | None = None,
    reference: Reference | None = None,
    tell: Tell = lambda done, total: None,
) -> dict[str, Any]:
    """The report that `miaotui evaluate --json` prints. `source` as in `read_data`.

    With a reference, its tokenizer cuts the data, and both models are in memory at once.
    Raises UsageError for data that cannot be used and for a reference with another vocabulary, and whatever loading
    a model raises.
    """
    cut, settings = cut or Cut(), settings or Settings()
    started = time.perf_counter()
    data = read_data(source)
    opened = Opened.of(model)
    judge = opened
    if reference is not None:
        reference.check(cut)
        judge = Opened.of(reference.model)
        same_vocabulary(judge, opened)
    windows, notes = cut_windows(data, cut, judge.tokenizer, judge.render)
    report = _described(judge.tokenizer, data, cut, windows)
    with ExitStack() as stack:
        rows = stack.enter_context(Rows(settings.threads))
        scorer = stack.enter_context(closing(opened.load(settings, cut.size)))
        if reference is None:
            figures = perplexity(_scored(rows, scorer, windows, tell))
        else:
            original = stack.enter_context(closing(judge.load(reference.settings, cut.size)))
            _same_width(original, scorer)
            figures = _against(rows, original, scorer, windows, reference, tell)
    return {
        **figures,
        **report,
        "model": model,
        "settings": {**asdict(settings), **report["settings"]},
        "seconds": time.perf_counter() - started,
        "notes": [*notes, *_caution(windows)],
    }


def compare(
    models: Sequence[str],
    source: str | None,
    *,
    cut: Cut | None = None,
    settings: Settings | None = None,
    tell: Tell = lambda done, total: None,
) -> dict[str, Any]:
    """The report that `miaotui compare A B --json` prints: both perplexities, and the paired test of B against A.

    A's tokenizer cuts the data. One model at a time is in memory. Raises as `evaluate` does.
    """
    cut, settings = cut or Cut(), settings or Settings()
    data = read_data(source)
    opened = [Opened.of(model) for model in models]
    same_vocabulary(*opened)
    windows, notes = cut_windows(data, cut, opened[0].tokenizer, opened[0].render)
    total = 2 * _size(windows)
    scores: list[list[Values]] = []
    with Rows(settings.threads) as rows:
        for turn, one in enumerate(opened):
            before = turn * total // 2
            with closing(one.load(settings, cut.size)) as scorer:
                scores.append(_scored(rows, scorer, windows, lambda done, _: tell(before + done, total)))  # noqa: B023
    report = _described(opened[0].tokenizer, data, cut, windows)
    return {
        "models": [{"model": m, **perplexity(s)} for m, s in zip(models, scores, strict=True)],
        **paired(*scores),
        **report,
        "settings": {**asdict(settings), **report["settings"]},
        "notes": [*notes, *_caution(windows)],
    }


def same_vocabulary(original: Opened, other: Opened) -> None:
    """Raise UsageError unless every token that both tokenizers have has the same number.

    One may go on where the other ends: tokens that only fill up the table (`[PAD151936]`) are written by some tools.
    """
    first, second = _tokens(original.tokenizer), _tokens(other.tokenizer)
    shared = range(min(max(first), max(second)) + 1)
    differing = next((i for i in shared if first.get(i) != second.get(i)), None)
    if differing is not None:
        raise UsageError(
            f"{original.model} and {other.model} have different vocabularies: token {differing} is"
            f" {first.get(differing)!r} in one and {second.get(differing)!r} in the other.",
            "Compare models with the same tokenizer, such as a model and what was made from it.",
        )


# -- figures ---------------------------------------------------------------------------------------------
def perplexity(nll: Sequence[Values]) -> dict[str, Any]:
    """`perplexity`, `stderr`, `perplexity_interval` of per-token -log p in windows."""
    figures = intervals.mean(nll).exp().report("perplexity")
    return {"perplexity": figures.pop("perplexity"), "stderr": figures.pop("perplexity_stderr"), **figures}


def paired(reference: Sequence[Values], nll: Sequence[Values]) -> dict[str, Any]:
    """How a model differs from a reference on the same windows: the difference of -log p, the ratio, a p-value."""
    differences = [b - a for a, b in zip(reference, nll, strict=True)]
    difference = intervals.mean(differences)
    return {
        **difference.exp().report("perplexity_ratio"),
        **difference.report("nll_difference"),
        "p_value": intervals.paired_test(difference, intervals.clusters(differences)),
    }


def divergences(found: Sequence[Divergence]) -> dict[str, Any]:
    """The figures of a model against a reference, on the same tokens."""
    kl = [one.kl for one in found]
    return {
        **perplexity([one.nll for one in found]),
        **paired([one.reference_nll for one in found], [one.nll for one in found]),
        **intervals.resampled_mean(kl).report("kl_mean"),
        **intervals.resampled_quantile(kl, 0.99).report("kl_p99"),
        **intervals.resampled_mean([one.flipped for one in found]).report("top1_flips"),
    }


def agreement(rows: Rows, original: Scorer, scorer: Scorer, windows: Sequence[Window], count: int) -> Estimate:
    """How many of `count` greedy tokens after the beginnings of windows are the reference's, in the mean.

    The model need not write: as long as it agrees it has the reference's tokens before it, so one pass over those
    shows where it would first have chosen another.
    """
    length = min(PROMPT_TOKENS, original.executor.shape.max_model_len - count)
    prompts = [window.tokens[:length] for window in windows[:AGREEMENT_PROMPTS]]
    equal = []
    for prompt, answer in zip(prompts, original.greedy(prompts, count), strict=True):
        whole = Window(np.concatenate([prompt, answer]), len(prompt))
        chosen = np.concatenate([logits.argmax(axis=1) for logits in scorer.logits(whole)])
        differing = np.flatnonzero(chosen != answer)
        equal.append(np.array([differing[0] if len(differing) else count], dtype=np.float64))
    return intervals.resampled_mean(equal)


# -- inside ----------------------------------------------------------------------------------------------
def _scored(rows: Rows, scorer: Scorer, windows: Sequence[Window], tell: Tell) -> list[Values]:
    return [rows.nll(scorer, window) for window in _told(windows, tell)]


def _against(
    rows: Rows, original: Scorer, scorer: Scorer, windows: Sequence[Window], reference: Reference, tell: Tell
) -> dict[str, Any]:
    found = [rows.divergence(original, scorer, window) for window in _told(windows, tell)]
    figures = divergences(found)
    if reference.agreement:
        equal = agreement(rows, original, scorer, windows, reference.agreement)
        prompts = min(AGREEMENT_PROMPTS, len(windows))
        figures |= {**equal.report("greedy_agreement"), "greedy_tokens": reference.agreement, "greedy_prompts": prompts}
    told = {"model": reference.model, **perplexity([one.reference_nll for one in found])}
    return {**figures, "reference": {**told, "settings": asdict(reference.settings)}}


def _described(tokenizer: Tokenizer, data: Data, cut: Cut, windows: Sequence[Window]) -> dict[str, Any]:
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    return {
        "tokens": _size(windows),
        "windows": len(windows),
        "data": data.name,
        "settings": {"window": cut.size, "stride": cut.stride, "max_windows": cut.most, "bos": bos},
    }


def _caution(windows: Sequence[Window]) -> list[str]:
    if len(windows) > 1:
        return []
    return ["One window only: the intervals take its tokens as independent, which makes them too narrow."]


def _told(windows: Sequence[Window], tell: Tell) -> Iterator[Window]:
    """The windows, one after the other, and word of each that is done."""
    done, total = 0, _size(windows)
    for window in windows:
        yield window
        done += len(window.targets)
        tell(done, total)


def _size(windows: Sequence[Window]) -> int:
    """Tokens that are scored."""
    return sum(len(window.targets) for window in windows)


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: token for token, number in tokenizer.backend.get_vocab().items()}


def _same_width(original: Scorer, scorer: Scorer) -> None:
    widths = original.executor.vocab_size, scorer.executor.vocab_size
    if widths[0] != widths[1]:
        raise UsageError(
            f"{original.model} has logits for {widths[0]} tokens and {scorer.model} for {widths[1]}.",
            "Compare models with the same vocabulary, or leave out --reference.",
        )
