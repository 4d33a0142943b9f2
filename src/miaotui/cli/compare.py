"""`miaotui compare`: two models on the same text, side by side, and whether they can be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from miaotui.cli.evaluate import line, named, on_what, quality_options, show, take
from miaotui.cli.progress import progress

SIGNIFICANT = 0.05


@click.command("compare")
@click.argument("a")
@click.argument("b")
@quality_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(a: str, b: str, data: str | None, as_json: bool, **options: Any) -> None:
    """Compare the perplexity of models A and B on the same windows of a text.

    The test is Student's paired t over windows. Both must have the same vocabulary.
    """
    from miaotui.measure.quality import compare

    cut, settings = take(options)
    with progress("comparing") as tell:
        report = compare([a, b], data, cut=cut, settings=settings, tell=tell)
    show(report, comparison, as_json=as_json)


def comparison(report: dict[str, Any]) -> Iterator[str]:
    """The lines of a comparison, the verdict last."""
    yield on_what(report)
    for letter, one in zip("AB", report["models"], strict=True):
        figure = line(letter, one["perplexity"], one["stderr"], one["perplexity_interval"], ".3f")
        yield f"{figure}  {one['model']}"
    yield named(report, "B ÷ A", "perplexity_ratio", ".4f")
    yield verdict(report)


def verdict(report: dict[str, Any]) -> str:
    """What the paired test says, in a sentence."""
    ratio, interval, p = report["perplexity_ratio"], report["perplexity_ratio_interval"], report["p_value"]
    if ratio == 1.0 and p in (None, 1.0):
        return "No difference: A and B give every token the same probability."
    if interval is None:
        return "One token is too little to tell A and B apart."
    change = f"its perplexity is {abs(ratio - 1):.2%} {'higher' if ratio > 1 else 'lower'}"
    paired = f"paired over {report['windows']} windows" if report["windows"] > 1 else "paired over the tokens"
    told = f"(95%: {interval[0] - 1:+.2%} to {interval[1] - 1:+.2%}, {paired}, p {_p(p)})"
    if p >= SIGNIFICANT:
        return f"A and B cannot be told apart here: of B, {change} {told}."
    return f"B is {'worse' if ratio > 1 else 'better'}: {change} {told}."


def _p(p: float) -> str:
    return f"= {p:.2g}" if p >= 1e-4 else "< 0.0001"
