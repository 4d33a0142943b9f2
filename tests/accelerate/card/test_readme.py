"""README.md of an artefact: what the hub reads of it, and that nothing of a card becomes markup."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from miaotui.accelerate.card import readme
from miaotui.accelerate.card.files import read
from miaotui.accelerate.card.publish import publish
from miaotui.accelerate.card.schema import Card, Model, Technique
from tests.accelerate.card.test_report import EVIL as MARKUP
from tests.accelerate.card.test_report import kept_original
from tests.accelerate.cards import TRIALS, make_card

EVIL = MARKUP + " | [a](https://b.example) ![c](d) *e* `f` **g** # h\n# i\n- j"


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, as a Markdown reader finds them."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    for before, token in itertools.pairwise(tokens):
        if before.type == "table_open":
            found.append([])
        if before.type == "tr_open":
            found[-1].append([])
        if before.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


def test_the_hub_reads_it() -> None:
    data = ModelCard(readme.render(make_card())).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "a/SmolLM2-135M"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "miaotui"
    assert data["tags"] == ["miaotui", "compressed-tensors", "w4g32-sym"]


@pytest.mark.parametrize("name", ["not a hub name", "a/b\nlicense: mit", None])
def test_what_is_not_known_is_left_out(name: str | None) -> None:
    card = make_card(model=replace(make_card().model, base_model=name, license=None))
    data = ModelCard(readme.render(card)).data.to_dict()
    assert not {"base_model", "license", "base_model_relation"} & set(data)


def test_the_measured_table_is_there_and_caveats_come_first() -> None:
    card = make_card()
    text = readme.render(card)
    before_after = tables(text)[0]
    assert ["decode-1@512, tokens/s", "61.2 (60.0 – 62.1)", "262 (257 – 266)", "4.28×"] in before_after
    assert ["weights, MB", "269", "98.3", "2.74×"] in before_after
    assert text.index(card.caveats[0]) < text.index("## Before and after")
    assert all(command in text for command in card.commands)
    assert "miaotui serve smollm2-fast --threads 2 --kv-cache-dtype bf16" in text
    assert "unavailable (no power sensor: /sys/class/powercap is not there)" in text


def evil() -> Card:
    card = make_card()
    return replace(
        card,
        verdict=EVIL, caveats=(EVIL,), machine={**card.machine, "cpu": EVIL}, versions={EVIL: EVIL},
        model=Model(EVIL, EVIL, 1, 1, EVIL, EVIL, EVIL), commands=("```\n" + EVIL,),
        artefact=replace(card.artefact, name=EVIL, techniques=(Technique(EVIL, True, EVIL),)),
        search=replace(card.search, trials=tuple(replace(one, name=EVIL, why=EVIL) for one in TRIALS)),
    )  # fmt: skip


def test_words_of_a_card_are_never_markup() -> None:
    text = readme.render(evil())
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    blocks = [t.content for t in tokens if t.type == "html_block"]
    assert [block.strip() for block in blocks] == ["<details><summary>Recipe</summary>", "</details>"]
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {
        "text",
        "softbreak",
        "strong_open",
        "strong_close",
        "link_open",
        "link_close",
    }
    assert [child.attrs["href"] for child in inline if child.type == "link_open"] == ["report.html"]
    assert sum(child.type == "strong_open" for child in inline) == 1, "the verdict"
    heads = [after.content for before, after in itertools.pairwise(tokens) if before.type == "heading_open"]
    assert heads[1:] == [
        "Before and after", "Use", "What was kept, and why", "Search", "Other programs", "Measured with", "Reproduce",
    ]  # fmt: skip
    for found, columns in zip(tables(text), (4, 3, 4, 5, 2), strict=True):
        assert {len(row) for row in found} == {columns}
    assert any(" ".join(EVIL.split()) in row for row in tables(text)[2])
    assert ModelCard(text).data.to_dict()["license"] == EVIL


def test_a_card_with_little_in_it() -> None:
    text = readme.render(kept_original())
    assert "Keep the original" in text
    assert "Recipe" not in text
    assert "Reproduce" not in text


@pytest.mark.parametrize("name", ["", "a fast (1).gguf"])
def test_all_three_files_lie_together(tmp_path: Path, name: str) -> None:
    artefact = tmp_path / name
    if name:
        artefact.touch()
    paths = publish(make_card(), artefact)
    stem = "a fast (1)." if name else ""
    assert [path.name for path in paths] == [f"{stem}README.md", f"{stem}report.html", f"{stem}card.json"]
    assert read(artefact) == make_card()
    link = "](a%20fast%20%281%29.report.html)" if name else "](report.html)"
    assert link in paths[0].read_text()
