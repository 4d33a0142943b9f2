"""report.html: what it says, and how a real browser shows it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miaotui.accelerate.card import charts, report
from miaotui.accelerate.card.schema import Card, Energies, Energy, Model, Qualities, Sensitivity, Speeds, Technique
from miaotui.accelerate.card.words import CHINESE
from tests.accelerate.cards import REGIME, TRIALS, make_card, trial

EVIL = "</script><img src=x onerror=alert(1)>\n| <b>"


# -- where marks stand -----------------------------------------------------------------------------------
def test_marks_stand_where_their_figures_say() -> None:
    chart = charts.pareto(make_card(), 760, 430)
    assert chart is not None
    marks = {mark.trial.name: mark for mark in chart.marks}
    fast, faithful = marks["w3g64-sym gptq"], marks["w8-channel rtn"]
    assert fast.x > marks["w4g32-sym gptq"].x > faithful.x
    assert fast.y < marks["w4g32-sym gptq"].y < faithful.y
    assert {mark.kind for mark in chart.marks} == {"won", "front", "dominated", "broken"}
    assert marks["w4g32-sym rtn"].kind == "broken"
    assert marks["w8a8 smooth"].kind == "dominated"
    assert all(chart.x0 <= m.left <= m.x <= m.right <= chart.x1 for m in chart.marks)
    assert all(chart.y0 <= m.top <= m.y <= m.bottom <= chart.y1 for m in chart.marks)
    assert chart.floor is not None
    assert marks["w4g32-sym rtn"].y < chart.floor < marks["w4g32-sym gptq"].y
    assert len(marks) == 8, "what was not measured has no place"


def test_ticks_are_round_and_within() -> None:
    chart = charts.pareto(make_card(), 340, 400)
    assert chart is not None
    assert [tick.text for tick in chart.x_ticks] == ["0", "100", "200", "300", "400"]
    assert [tick.text for tick in chart.y_ticks] == ["0.001", "0.01", "0.1"]
    assert all(chart.y0 <= tick.at <= chart.y1 for tick in chart.y_ticks)


@pytest.mark.parametrize("width", [340, 760])
@pytest.mark.parametrize(
    "name", ["w4", "w4g32-sym gptq", "w4g32-sym gptq with a very long name that no plot has room for"]
)
def test_the_winner_is_named_within_the_plot_or_beside_it(name: str, width: int) -> None:
    card = make_card(search=replace(make_card().search, trials=(replace(TRIALS[2], name=name), *TRIALS[3:])))
    chart = charts.pareto(card, width, 400)
    assert chart is not None
    labels = [mark.label for mark in chart.marks if mark.label]
    for label in labels:
        end = label.x + 8 * len(label.text) * (1 if label.anchor == "start" else -1)
        assert chart.x0 <= min(label.x, end) <= max(label.x, end) <= chart.x1
        assert label.text == name
    assert len(labels) == (len(name) < 20)
    assert re.search(rf"winner</span>.*<b>{name}</b></span>", report.render(card))


@pytest.mark.parametrize(("count", "ticks"), [(1, [0]), (4, [0, 1, 2, 3]), (30, [0, 5, 10, 15, 20, 25, 29]), (80, 9)])
def test_the_axis_of_layers_has_room_for_its_names(count: int, ticks: list[int] | int) -> None:
    heat = charts.heat_map([Sensitivity(layer, "all", "w4", 0.1) for layer in range(count)])
    assert heat is not None
    assert sorted(heat.ticks) == ticks or len(heat.ticks) == ticks


def test_a_single_trial_and_a_faithful_one_have_a_place() -> None:
    one = trial("same", "measured", 100.0, 0.0, "")
    chart = charts.pareto(make_card(search=replace(make_card().search, trials=(one,), baseline=None)), 340, 400)
    assert chart is not None
    assert chart.floor is None
    assert chart.x0 < chart.marks[0].x < chart.x1
    assert chart.y0 <= chart.marks[0].y <= chart.y1


def test_what_is_exact_stands_at_the_foot_and_reads_zero() -> None:
    exact = trial("threads 1", "measured", 70.0, 0.0, "")
    chart = charts.pareto(make_card(search=replace(make_card().search, trials=(exact, *TRIALS))), 340, 400)
    assert chart is not None
    marks = {mark.trial.name: mark for mark in chart.marks}
    assert chart.y_ticks[0] == charts.Tick(marks["threads 1"].y, "0")
    assert max(m.bottom for name, m in marks.items() if name != "threads 1") < marks["threads 1"].y - 10 < chart.y1


def test_sensitivity_shares_one_scale() -> None:
    heat = charts.heat_map(make_card().sensitivity)
    assert heat is not None
    assert heat.layers == tuple(range(30))
    levels = {(role, cell.layer): cell.level for role, cells in heat.roles for cell in cells}
    assert max(levels.values()) == 1.0 == levels["mlp_out", 0]
    assert charts.heat_map(()) is None
    partial = charts.heat_map(make_card().sensitivity[1:])
    assert partial is not None
    assert next(cell.kl for role, cells in partial.roles if role == "qkv" for cell in cells) is None


# -- what the page says ----------------------------------------------------------------------------------
def kept_original() -> Card:
    """Nothing won, and little was measured."""
    card = make_card()
    return replace(
        card,
        verdict="Keep the original: nothing that was tried is faster within the floor.",
        artefact=replace(card.artefact, recipe=None, techniques=()),
        floor=replace(card.floor, ratio=None, verdict="undecided"),
        speed=Speeds(card.speed.before),
        quality=Qualities(card.quality.before),
        search=replace(card.search, trials=(), baseline=None),
        sensitivity=(), profile=(), peers=(), commands=(), caveats=(), calibration={}, machine={}, versions={},
    )  # fmt: skip


def test_everything_of_the_card_is_there() -> None:
    card = make_card()
    page = report.render(card)
    for text in (
        card.verdict, *card.caveats, *card.commands, *(one.why for one in card.artefact.techniques),
        *(one.name for one in card.search.trials), "llama.cpp", "1.53×", "+0.43%", "33.0 GB/s", "gate_up",
    ):  # fmt: skip
        assert str(report.escape(text)) in page, text
    assert page.index("Read this first") < page.index("Before and after")


def test_words_of_a_card_are_never_markup() -> None:
    card = make_card()
    evil = replace(
        card,
        verdict=EVIL, caveats=(EVIL,), commands=(EVIL,), machine={**card.machine, "cpu": EVIL}, versions={EVIL: EVIL},
        model=Model(EVIL, EVIL, 1, 1, EVIL, EVIL, EVIL), energy=Energies(Energy(unavailable=EVIL)),
        artefact=replace(card.artefact, name=EVIL, techniques=(Technique(EVIL, True, EVIL),), recipe={EVIL: EVIL}),
        search=replace(card.search, trials=tuple(replace(one, name=EVIL, why=EVIL) for one in TRIALS)),
    )  # fmt: skip
    page = report.render(evil)
    assert "<img" not in page
    assert page.count("</script>") == 1


def test_the_regime_that_stands_large() -> None:
    card = make_card()
    heroes = report.heroes(card)
    assert heroes[0][:3] == ("4.28×", "as fast", f"{REGIME}: 61.2 → 262 tokens/s")
    memory = replace(card, search=replace(card.search, goal="memory", regime="a goal's own"))
    assert report.heroes(memory)[0][:3] == ("2.13×", "less memory", "peak-memory: 512 → 240 MB")


def test_weights_that_stayed_are_not_called_smaller() -> None:
    card = make_card()
    same = replace(card, artefact=replace(card.artefact, bytes=card.model.bytes, recipe={}))
    assert [hero[1] for hero in report.heroes(same)] == ["as fast", "perplexity", "recipes tried"]
    assert "Recipe" not in report.render(same).split("<main>")[1]


def test_our_own_words_are_translated() -> None:
    said = set(re.findall(r'\bts?\("([^"]+)"', (report.WEB / "report.html").read_text()))
    assert said - set(CHINESE) == set()


# -- in a browser ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[dev]")
    program = os.environ.get("MIAOTUI_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: install the package chromium, or name one in MIAOTUI_CHROMIUM")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a card's report. At the end: nothing was logged, and nothing but the file itself was asked for."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def go(card: Card, *, width: int = 1280, **options: Any) -> Any:
        address = report.write(card, tmp_path).as_uri()
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(f"an exception: {error}"))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: wrong.append(request.url) if request.url != address else None)
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


OVERFLOW = """() => [...document.querySelectorAll('body, body *')]
  .filter((e) => e.checkVisibility() && !e.closest('.scroll table, pre, .unseen, .columns.axis'))
  .filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map((e) => `${e.tagName} ${e.textContent.trim().slice(0, 40)}`)"""


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_is_drawn(visit: Callable[..., Any], tmp_path: Path, width: int, scheme: str, locale: str) -> None:
    page = visit(make_card(), width=width, color_scheme=scheme, locale=locale)
    assert page.evaluate(OVERFLOW) == []
    assert page.locator("svg.pareto:visible").count() == 1
    assert page.locator("svg.pareto:visible .mark").count() == 8
    paper = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert paper < 64 if scheme == "dark" else paper > 192
    assert page.get_by_role("heading", name="速度与忠实度" if locale == "zh-CN" else "Speed against").is_visible()
    assert page.locator("html").get_attribute("lang") == ("zh-CN" if locale == "zh-CN" else "en")
    picture = tmp_path / f"{width}-{scheme}.png"
    page.screenshot(path=str(picture), full_page=True)
    assert picture.stat().st_size > 50_000


def test_a_mark_tells_its_figures(visit: Callable[..., Any]) -> None:
    page = visit(make_card())
    page.locator("svg.pareto.wide circle.won").hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert all(text in tip.inner_text() for text in ("w4g32-sym gptq", "262", "0.00680", "The fastest that holds"))
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator(".columns.tall > span").first.hover()
    assert tip.inner_text() == "layer 0: 0.00360 nats"


def test_theme_language_and_trials(visit: Callable[..., Any]) -> None:
    page = visit(make_card(), color_scheme="light", locale="en-US")
    assert page.get_by_text("Hopeless on 4 windows").is_hidden()
    page.locator("summary").first.click()
    assert page.get_by_text("Hopeless on 4 windows").is_visible()
    page.get_by_role("button", name="中文").click()
    assert page.get_by_role("heading", name="前后对比").is_visible()
    assert page.get_by_role("heading", name="Before and after").count() == 0
    page.get_by_role("button", name="Theme").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_without_scripts_everything_is_there(visit: Callable[..., Any]) -> None:
    page = visit(make_card(), java_script_enabled=False)
    assert page.get_by_role("heading", name="Before and after").is_visible()
    assert page.locator("svg.pareto.wide").is_visible()
    assert page.locator(".buttons").is_hidden()


def test_a_card_with_little_in_it(visit: Callable[..., Any]) -> None:
    page = visit(kept_original(), width=360)
    assert page.evaluate(OVERFLOW) == []
    assert page.get_by_text("original kept").is_visible()
    assert page.locator("svg.pareto").count() == 0
    assert page.get_by_role("heading", name="Read this first").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(visit: Callable[..., Any], scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1, for each text colour on each ground that it stands on."""
    page = visit(make_card(), color_scheme=scheme)
    pairs = [("ink", g) for g in ("paper", "surface", "raised", "second-tint")]
    pairs += [("soft", g) for g in ("paper", "surface", "raised")]
    pairs += [("accent", g) for g in ("paper", "surface", "tint")]
    pairs += [("second", g) for g in ("paper", "surface", "second-tint")]
    for text, ground in pairs:
        assert page.evaluate(CONTRAST, [text, ground]) >= 4.5, (text, ground)


CONTRAST = """([text, ground]) => {
  const light = (name) => {
    const probe = document.body.appendChild(document.createElement('i'));
    probe.style.color = `var(--${name})`;
    const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
    probe.remove();
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const [a, b] = [light(text), light(ground)];
  return Math.max(a, b) / Math.min(a, b);
}"""
