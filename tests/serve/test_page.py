"""The page in a real browser, against a real `miaotui serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from miaotui.accelerate.card.publish import publish
from miaotui.serve.page import WEB, add_card
from tests.accelerate.cards import make_card

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's tests need playwright: pip install -e .[dev]"
)
expect = playwright.expect
pytestmark = pytest.mark.timeout(90)

QUESTION = "Tell me a long story about a bicycle."
KEY = "sk-only-for-this-test"
CARD = {
    "schema": 1,
    "model": "quick",
    "summary": "Three times as fast.",
    "speed": {
        "decode_1": {
            "before": {"median": 60.0, "low": 59.0, "high": 61.5, "unit": "tok/s"},
            "after": {"median": 180.0, "low": 178.0, "high": 182.0, "unit": "tok/s"},
        }
    },
    "quality": [{"measure": "perplexity", "before": 14.0, "after": 14.07}],
    "machine": {"cores": 2, "isa": ["avx2", "avx512"]},
    "caveats": ["<img src=x onerror=alert(1)>", None, {"value": 1.5}],
    "odd": [{"a": 1}, {"b": [1, {"c": None}]}, "text"],
}


# -- a browser and a server ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = os.environ.get("MIAOTUI_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("the page's tests need Chromium: install the package chromium, or name one in MIAOTUI_CHROMIUM")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def running(model: Path, *options: str) -> Iterator[str]:
    """The address of a `miaotui serve` that is ready, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "miaotui.cli.main",
        "serve",
        str(model),
        "--port",
        "0",
        "--served-model-name",
        "demo",
    ]
    command += ["--max-model-len", "1024", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"Ready: (http://\S+)/v1", line):
                break
        else:
            pytest.fail(f"the server did not start: {''.join(said)}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield f"{found[1]}/"
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        process.stderr.close()


@pytest.fixture(scope="module")
def address(demo_gguf: Path, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the demo model, beside which a card lies."""
    folder = tmp_path_factory.mktemp("artefact")
    (folder / "demo.gguf").symlink_to(demo_gguf)
    (folder / "card.json").write_text(json.dumps(CARD))
    with running(folder / "demo.gguf") as started:
        yield started


Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens an address in a fresh profile. At the end: no error was logged, and no request left the origin."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def go(
        url: str,
        *,
        width: int = 1280,
        height: int = 800,
        locale: str = "en-US",
        routes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, locale=locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: wrong.append(f"an exception: {error}"))
        # The browser itself logs answers of 4xx and 5xx; the page asks on purpose whether there is a card, or a key.
        page.on("console", lambda m: wrong.append(m.text) if logged(m) else None)
        page.on("request", lambda r: wrong.append(f"asked {r.url}") if not r.url.startswith(url) else None)
        for pattern, answer in (routes or {}).items():
            page.route(pattern, answer)
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


def logged(message: Any) -> bool:
    meant = "Failed to load resource", "requires 'TrustedHTML'"
    return message.type in ("error", "warning") and not any(words in message.text for words in meant)


def ask(page: Any, text: str = QUESTION, *, tokens: int | None = 24) -> None:
    """Sends a question with the keyboard, once the model is there; `tokens` bounds the answer."""
    expect(page.locator("#model")).to_be_enabled()
    if tokens is not None:
        page.click("#tab-settings")
        page.fill("#max_tokens", str(tokens))
        page.click("#tab-live")
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page: Any, count: int = 1) -> Any:
    """The last of `count` answers, finished."""
    expect(page.locator(".reply .figures span:first-child")).to_have_count(count)
    return page.locator(".reply").last


def requests_of(page: Any) -> list[dict[str, Any]]:
    """The bodies of all chat requests from here on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("/chat/completions") else None)
    return bodies


# -- the conversation ------------------------------------------------------------------------------------
def test_a_question_is_answered_as_a_stream(address: str, visit: Open) -> None:
    page = visit(address)
    expect(page.locator("#empty")).to_be_visible()
    page.evaluate("""() => {
      window.lengths = new Set();
      new MutationObserver(() => window.lengths.add(document.querySelector('.answer')?.textContent.length ?? 0))
        .observe(document.querySelector('#turns'), { childList: true, subtree: true, characterData: true });
    }""")
    bodies = requests_of(page)
    ask(page, tokens=80)
    reply = answered(page)
    assert len(page.evaluate("[...window.lengths]")) > 2, "the answer came in one piece"
    assert page.locator("#empty").is_hidden()
    assert reply.locator(".answer").inner_text().strip()
    assert re.search(
        r"[\d.]+ tokens/s.*first token [\d.]+ m?s.*80 tokens", reply.locator(".figures").inner_text(), re.S
    )
    assert "raised under Settings" in reply.locator(".figures").inner_text()
    assert page.locator("#said").text_content().startswith("Answer: ")
    (body,) = bodies
    assert body["messages"] == [{"role": "user", "content": QUESTION}]
    assert (body["model"], body["stream"], body["max_tokens"], body["temperature"]) == ("demo", True, 80, 0.7)
    assert "seed" not in body
    assert page.evaluate("document.activeElement.id") == "question"


def test_shift_enter_and_an_input_method_do_not_send(address: str, visit: Open) -> None:
    page = visit(address)
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#send")).to_be_disabled()
    page.fill("#question", "one")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    page.evaluate(
        "document.querySelector('#question').dispatchEvent("
        "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true }))"
    )
    assert page.locator(".turn").count() == 0


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_can_be_stopped(address: str, visit: Open, how: str) -> None:
    page = visit(address)
    ask(page, tokens=900)
    expect(page.locator(".streaming")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    reply = answered(page)
    assert "Stopped here" in reply.locator(".figures").inner_text()
    assert " 900 tokens" not in reply.locator(".figures").inner_text()
    text = reply.locator(".answer").inner_text()
    expect(page.locator("#send")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "question"
    page.wait_for_timeout(200)
    assert reply.locator(".answer").inner_text() == text
    ask(page, "Go on.", tokens=8)
    answered(page, 2)


def test_answer_again_edit_clear_and_undo(address: str, visit: Open) -> None:
    page = visit(address)
    bodies = requests_of(page)
    ask(page)
    answered(page)
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".reply")).to_have_count(1)
    answered(page)
    assert bodies[0]["messages"] == bodies[1]["messages"]
    ask(page, "And then?")
    answered(page, 2)
    page.locator(".question").first.hover()
    page.get_by_role("button", name="Edit the question").first.click()
    page.get_by_label("Edit your question").fill("Something else.")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text(["Something else."])
    answered(page)
    assert bodies[-1]["messages"] == [{"role": "user", "content": "Something else."}]
    page.reload()
    expect(page.locator(".bubble")).to_have_text(["Something else."])
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#empty")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".bubble")).to_have_text(["Something else."])
    answered(page)


def test_settings_are_sent_checked_and_remembered(address: str, visit: Open) -> None:
    page = visit(address)
    bodies = requests_of(page)
    expect(page.locator("#model")).to_be_enabled()
    page.click("#tab-settings")
    sent = {"temperature": 0.2, "top_p": 0.5, "top_k": 7, "max_tokens": 5, "seed": 3}
    for name, value in sent.items():
        page.fill(f"#{name}", str(value))
    page.fill("#system", "Be brief.")
    page.fill("#top_k", "1.5")
    expect(page.locator("#top_k")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#top_k-wrong")).to_contain_text("whole number from 0 to 1,000")
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    ask(page, tokens=None)
    answered(page)
    assert {name: bodies[0][name] for name in sent} == sent
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#tab-settings")
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.input_value("#temperature") == "0.7"
    assert page.input_value("#system") == ""


# -- language, looks, access -----------------------------------------------------------------------------
def test_the_language_can_be_switched_and_is_remembered(address: str, visit: Open) -> None:
    page = visit(address)
    ask(page)
    answered(page)
    page.get_by_role("button", name="切换到中文").click()
    assert page.get_attribute("html", "lang") == "zh-Hans"
    expect(page.get_by_role("tab", name="实时")).to_be_visible()
    assert page.get_attribute("#question", "placeholder") == "问点什么"
    assert "词元/秒" in page.locator(".figures").inner_text()
    page.reload()
    assert page.get_attribute("html", "lang") == "zh-Hans"
    leftover = page.evaluate(VISIBLE_WORDS)
    assert [words for words in leftover if re.search(r"[a-z]{4,} [a-z]{2,}", words)] == []
    page.get_by_role("button", name="Switch to English").click()
    expect(page.get_by_role("tab", name="Live")).to_be_visible()


VISIBLE_WORDS = """() => [...document.querySelectorAll('body :not(script, style, .turns *, option)')]
  .filter((e) => e.childElementCount === 0 && e.checkVisibility()).map((e) => e.textContent)"""


def test_chinese_comes_by_itself_and_both_languages_have_the_same_words(address: str, visit: Open) -> None:
    page = visit(address, locale="zh-CN")
    expect(page.get_by_text("想问点什么？")).to_be_visible()
    words = page.evaluate("import('./strings.js').then(({ STRINGS }) => STRINGS)")
    assert set(words["en"]) == set(words["zh"])
    for key, english in words["en"].items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", words["zh"][key])), key


def test_light_and_dark(address: str, visit: Open) -> None:
    def paper(page: Any) -> int:
        return int(page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"))

    page = visit(address, color_scheme="dark")
    assert paper(page) < 64
    toggle = page.get_by_role("button", name="Dark")
    assert toggle.get_attribute("aria-pressed") == "true"
    toggle.click()
    assert paper(page) > 192
    page.reload()
    assert paper(page) > 192
    assert toggle.get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(address: str, visit: Open, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1, for each text colour on each ground that it stands on."""
    page = visit(address, color_scheme=scheme)
    pairs = [("ink", g) for g in ("paper", "surface", "raised", "tint", "bad-tint")]
    pairs += [("soft", g) for g in ("paper", "surface", "raised", "bad-tint")]
    pairs += [
        ("on-accent", "accent"),
        ("accent", "surface"),
        ("second", "paper"),
        ("bad", "surface"),
        ("bad", "bad-tint"),
    ]
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


def test_on_a_narrow_screen_nothing_overflows(address: str, visit: Open) -> None:
    page = visit(address, width=360, height=640, has_touch=True)
    code = "```\\n" + "x" * 300 + "\\n```\\n" + "y" * 300
    page.evaluate(SHOW, code)
    assert page.evaluate(OVERFLOW) == []
    page.get_by_role("button", name="Side panel").click()
    for name in ("Live", "Settings"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate(OVERFLOW) == []
    assert page.evaluate("document.querySelector('#chat').inert")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "panel-toggle"


SHOW = """(text) => import('./turn.js').then(({ Answer, Question }) => {
  const turns = [new Question('z'.repeat(200), () => {}), new Answer(() => {})];
  document.querySelector('#empty').hidden = true;
  document.querySelector('#turns').append(...turns.map((turn) => turn.element));
  turns[1].write(text.replaceAll('\\\\n', '\\n'));
  turns[1].end({ finish: 'length', stats: { rate: 123.4, first: 0.5, tokens: 512, counted: true } });
})"""

OVERFLOW = """() => {
  // A drawn text's own two widths differ by rounding: only where it ends counts.
  const inside = (e) => e.closest('pre, .table, .unseen, .skip, .sprite, .brand > span');
  return [...document.querySelectorAll('body, body *')].filter((e) => e.checkVisibility() && !inside(e))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5
      || (!e.closest('svg') && e.scrollWidth > (e.clientWidth || Infinity)))
    .map((e) => `${e.tagName} ${e.id} ${e.className} ${e.closest('svg') ? e.textContent : ''}`);
}"""


def test_every_control_has_a_name_and_can_be_reached(address: str, visit: Open) -> None:
    page = visit(address)
    ask(page)
    answered(page)
    for tab in ("Live", "Settings"):
        page.get_by_role("tab", name=tab).click()
        controls = page.evaluate(CONTROLS)
        assert len(controls) > 10
        assert [c for c in controls if not c["name"]] == []
    names = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(names) == len(set(names))
    assert page.evaluate(DANGLING) == []
    page.get_by_role("tab", name="Settings").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-live"
    expect(page.locator("#pane-live")).to_be_visible()
    page.evaluate("document.activeElement.blur(); document.body.focus()")
    page.reload()
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"


CONTROLS = """() => [...document.querySelectorAll('button, input, textarea, select, [tabindex="0"]')]
  .filter((e) => e.checkVisibility()).map((e) => ({
    what: e.outerHTML.slice(0, 80),
    name: (e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent ||
      document.getElementById(e.getAttribute('aria-labelledby'))?.textContent || '').trim(),
  }))"""

DANGLING = """() => ['for', 'aria-labelledby', 'aria-describedby', 'aria-controls'].flatMap((name) =>
  [...document.querySelectorAll(`[${name}]`)].flatMap((e) => e.getAttribute(name).split(' '))
    .filter((id) => !document.getElementById(id)))"""


# -- what models and servers say -------------------------------------------------------------------------
def test_markdown_is_text_and_nothing_else(address: str, visit: Open) -> None:
    page = visit(address)
    text = "\n".join(
        [
            "# Head <script>alert(1)</script>",
            "One **bold** and *slanted* and `co*de*` <img src=x onerror=alert(1)> [link](javascript:alert(1))",
            "2 * 3 * 4, snake_case_name, **open",
            "",
            "3. three",
            "   - inner",
            "4. four",
            "",
            "```html",
            "<b>**raw**</b>",
            "",
            "```",
            "> said",
        ]
    )
    page.evaluate(SHOW, text)
    answer = page.locator(".answer")
    assert answer.evaluate("(e) => [...e.children].map((c) => c.tagName)") == ["H3", "P", "OL", "DIV", "BLOCKQUOTE"]
    assert answer.locator("strong").all_inner_texts() == ["bold"]
    assert answer.locator("em").all_inner_texts() == ["slanted"]
    assert answer.locator("p code").all_inner_texts() == ["co*de*"]
    assert answer.locator("pre").text_content() == "<b>**raw**</b>\n"
    assert answer.locator("ol").get_attribute("start") == "3"
    assert answer.locator("ol > li > ul > li").all_inner_texts() == ["inner"]
    assert answer.locator("script, img, a, b, i").count() == 0
    assert "2 * 3 * 4, snake_case_name, **open" in answer.inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_role("button", name="Copy the code").click()
    expect(page.locator("#said")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "<b>**raw**</b>\n"


def test_hostile_markdown_is_read_in_linear_time(address: str, visit: Open) -> None:
    """Twenty times what would take a quadratic reader a second: it would run into the time-out."""
    page = visit(address)
    for piece in ("**a ", "`` ` ", "*a _", "- x\n  ", "> \n", "~~~\n", "1. "):
        text = piece * 200_000
        assert page.evaluate("(t) => import('./markdown.js').then(({ parse }) => parse(t).length)", text) > 0
        assert page.evaluate("(t) => import('./markdown.js').then(({ inline }) => inline(t).length)", text) > 0


def test_nesting_without_end_is_cut(address: str, visit: Open) -> None:
    page = visit(address)
    page.evaluate(SHOW, "> " * 20_000 + "deep")
    assert "deep" in page.locator(".answer").inner_text()
    page.evaluate(SHOW, "\n".join(" " * depth + "- item" for depth in range(2000)))
    expect(page.locator(".answer").last.locator("li")).to_have_count(2000)


def test_a_growing_answer_keeps_what_stands(address: str, visit: Open) -> None:
    page = visit(address)
    assert page.evaluate("""async () => {
      const { show } = await import('./markdown.js');
      const host = document.createElement('div');
      show(host, 'one\\n\\n```py\\na');
      const [first, second] = host.children;
      show(host, 'one\\n\\n```py\\na = 1\\n```\\nthree');
      return host.children[0] === first && host.children[1] === second && host.children.length === 3
        && second.querySelector('code').textContent === 'a = 1';
    }""")


def test_events_are_read_however_they_are_cut(address: str, visit: Open) -> None:
    page = visit(address)
    assert (
        page.evaluate("""async () => {
      const { eventsOf } = await import('./api.js');
      const lines = [': hi\\r', 'data: {"é":"秒推"}\\r', '\\r', 'data:two', 'data: lines', '', 'data: [DONE]', '', ''];
      const bytes = new TextEncoder().encode(lines.join('\\n'));
      for (let size = 1; size <= bytes.length; size += 1) {
        const stream = new ReadableStream({ start(c) {
          for (let i = 0; i < bytes.length; i += size) c.enqueue(bytes.slice(i, i + size));
          c.close();
        }});
        const found = [];
        for await (const data of eventsOf(new Response(stream))) found.push(data);
        if (JSON.stringify(found) !== JSON.stringify(['{"é":"秒推"}', 'two\\nlines', '[DONE]'])) return found;
      }
      return true;
    }""")
        is True
    )


FAILURES = [
    (429, None, "3", "hands full", "Wait 3 s"),
    (400, "context_length_exceeded", None, "longer than the model can read", "Start a new chat"),
    (400, None, None, "refused the request", "Change what it names"),
    (404, None, None, "doesn't know this model", "Pick another"),
    (503, None, None, "starting or shutting down", "Wait a moment"),
    (500, None, None, "wrong inside the server", "log"),
]


def test_errors_are_told_with_a_remedy(address: str, visit: Open) -> None:
    page = visit(address)
    left = list(FAILURES)

    def refuse(route: Any) -> None:
        status, code, retry = left[0][:3]
        error = {"message": f"Said with {status}.", "type": "x", "param": None, "code": code}
        route.fulfill(status=status, headers={"retry-after": retry} if retry else {}, json={"error": error})

    page.route("**/chat/completions", refuse)
    ask(page)
    while left:
        status, _, _, words, remedy = left[0]
        told = page.get_by_role("alert").filter(has_text=words)
        expect(told).to_contain_text(remedy)
        expect(told).to_contain_text(f"Said with {status}.")
        left.pop(0)
        if not left:
            page.unroute("**/chat/completions")
        page.get_by_role("button", name="Try again").click()
    answered(page)
    assert page.locator(".turn").count() == 2


def test_a_lost_server_and_a_broken_stream_are_told(address: str, visit: Open) -> None:
    page = visit(address)
    page.route("**/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.get_by_role("alert").filter(has_text="can't be reached")).to_contain_text("miaotui serve")
    page.unroute("**/chat/completions")
    cut = 'data: {"choices":[{"index":0,"delta":{"content":"Half an"},"finish_reason":null}]}\n\n'
    page.route("**/chat/completions", lambda route: route.fulfill(body=cut, content_type="text/event-stream"))
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert").filter(has_text="broke off")).to_be_visible()
    expect(page.locator(".answer")).to_contain_text("Half an")


# -- figures and the card --------------------------------------------------------------------------------
def test_metrics_become_samples(address: str, visit: Open) -> None:
    page = visit(address)
    text = "\n".join(
        [
            "# HELP miaotui:num_requests_running x",
            'miaotui:num_requests_running{model_name="a, b} c"} 2.0'.replace("} c", " c"),
            "miaotui:num_requests_waiting 1",
            'miaotui:kv_cache_usage_perc{m="x"} 0.25',
            'miaotui:generation_tokens_total{m="x"} 100',
            'miaotui:generation_tokens_total{m="y"} 20.0',
            'miaotui:time_to_first_token_seconds_bucket{le="+Inf"} 9',
            "miaotui:time_to_first_token_seconds_sum 1.5",
            "miaotui:time_to_first_token_seconds_count 3",
            "python_info 1",
        ]
    )
    later = text.replace(" 100", " 180").replace("sum 1.5", "sum 2.0").replace("count 3", "count 5")
    made = page.evaluate(
        """([early, late]) => import('./metrics.js').then(({ parse, sample }) => {
          const before = { time: 10, figures: parse(early) };
          const after = { time: 12, figures: parse(late) };
          return [
            sample(10, before.figures, null), sample(12, after.figures, before), sample(13, before.figures, after),
          ];
        })""",
        [text, later],
    )
    assert made[0] == {"time": 10, "rate": None, "running": 2, "waiting": 1, "cache": 0.25, "first": None}
    assert made[1] == {"time": 12, "rate": 40, "running": 2, "waiting": 1, "cache": 0.25, "first": 0.25}
    assert made[2]["rate"] is None, "a server that began anew is no negative rate"


def test_the_charts_show_the_server_and_rest_out_of_sight(address: str, visit: Open) -> None:
    scrapes = 0

    def figures(route: Any) -> None:
        nonlocal scrapes
        scrapes += 1
        route.fulfill(body=scrape(running=3, waiting=1, cache=0.5, tokens=100 * scrapes, firsts=scrapes))

    page = visit(address, routes={"**/metrics": figures})
    charts = page.locator(".chart")
    expect(charts).to_have_count(4)
    expect(charts.nth(0).locator(".value")).to_have_text(re.compile(r"[1-9]\d"))
    expect(charts.nth(1).locator(".value")).to_have_text("3 running1 waiting")
    expect(charts.nth(2).locator(".value")).to_have_text("50%")
    expect(charts.nth(3).locator(".value")).to_have_text("250 ms")
    spoken = charts.nth(2).get_by_role("img").get_attribute("aria-label")
    assert spoken == "KV cache in use, the last minute. Now 50%; highest 50%."
    assert charts.nth(2).locator("text").all_text_contents() == ["0%", "50%", "100%", "60 s ago", "30 s ago", "now"]
    page.click("#tab-settings")
    page.wait_for_timeout(300)
    seen = scrapes
    page.wait_for_timeout(1500)
    assert scrapes == seen
    page.unroute("**/metrics")
    page.route("**/metrics", lambda route: route.abort())
    page.click("#tab-live")
    expect(page.locator("#live-state")).to_contain_text("can't be reached")


def scrape(*, running: int, waiting: int, cache: float, tokens: int, firsts: int) -> str:
    """What /metrics answers; each first token took a quarter of a second."""
    figures = {
        "num_requests_running": running,
        "num_requests_waiting": waiting,
        "kv_cache_usage_perc": cache,
        "generation_tokens_total": tokens,
        "time_to_first_token_seconds_sum": firsts / 4,
        "time_to_first_token_seconds_count": firsts,
    }
    return "".join(f'miaotui:{name}{{model_name="demo"}} {value}\n' for name, value in figures.items())


def test_a_card_is_shown_as_tables(address: str, visit: Open) -> None:
    page = visit(address)
    page.get_by_role("tab", name="Card").click()
    pane = page.locator("#pane-card")
    assert pane.locator("h3").inner_text() == "quick"
    rows = [row.inner_text().split("\t") for row in pane.locator("tbody tr").all()]
    assert [" ".join(cell.split()) for cell in rows[0]] == ["Decode 1", "60 tok/s 59–61.5", "180 tok/s 178–182", "× 3"]
    assert rows[1] == ["Perplexity", "14", "14.07", "+0.5%"]
    assert "avx2, avx512" in pane.inner_text()
    assert pane.locator("img").count() == 0
    page.get_by_role("button", name="切换到中文").click()
    expect(pane.get_by_role("columnheader", name="之后").first).to_be_visible()
    page.route("**/card.json", lambda route: route.fulfill(status=404))
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    expect(page.get_by_role("tab")).to_have_count(2)


def test_an_odd_card_breaks_nothing(address: str, visit: Open) -> None:
    page = visit(address)
    expect(page.locator("#model")).to_be_enabled()
    cards = [[], "text", 3, None, {}, {"a": {}}, {"before": 1, "after": {"x": []}}, {"rows": [[], {}]}, {"model": [1]}]
    for card in cards:
        page.route("**/card.json", lambda route, _, card=card: route.fulfill(body=json.dumps(card)))
        shown = page.evaluate(
            "import('./card.js').then(async ({ Card }) => { const c = new Card(); await c.load(); return c.card; })"
        )
        assert shown == (card if isinstance(card, dict) else None)


def measured_card() -> dict[str, Any]:
    """A card that accelerate would leave, with markup where words belong."""
    card = make_card(caveats=("<img src=x onerror=alert(1)>", "Measured on one text."))
    return card.plain()


def show_card(page: Any, card: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
    page.route("**/card.json", lambda route: route.fulfill(body=json.dumps(card), headers=headers or {}))
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    if page.locator("#panel").is_hidden():
        page.get_by_role("button", name="Side panel").click()
    page.get_by_role("tab", name="Card").click()
    return page.locator("#pane-card")


@pytest.mark.parametrize("width", [360, 1280])
def test_a_measured_card_is_drawn(address: str, visit: Open, width: int) -> None:
    page = visit(address, width=width)
    pane = show_card(page, measured_card(), {"Link": '<report.html>; rel="alternate"'})
    assert pane.locator("h3").inner_text() == "smollm2-fast"
    rows = [[" ".join(cell.split()) for cell in row.inner_text().split("\t")] for row in pane.locator("tbody tr").all()]
    assert ["Decode-1@512 tokens/s", "61.2 60 – 62.1", "262 257 – 266", "4.28×"] in rows
    assert ["Weights MB", "269", "98.3", "2.74×"] in rows
    assert any(row[-1] == "+0.43% +0.21% – +0.65%" for row in rows)
    text = pane.inner_text()
    assert text.index("Read this first") < text.index("Speed and size")
    assert "int8 cache — dropped. 1% slower" in text
    assert pane.locator("img").count() == 0
    assert pane.get_by_role("link", name="Charts and every trial").get_attribute("href") == "report.html"
    assert page.evaluate(OVERFLOW) == []
    assert all(pane.locator(".table").nth(i).evaluate("(e) => e.scrollWidth <= e.clientWidth") for i in range(2))
    if width < 1000:
        page.keyboard.press("Escape")
    page.get_by_role("button", name="切换到中文").click()
    expect(pane.get_by_role("columnheader", name="速度与大小", include_hidden=True)).to_have_count(1)


def test_a_measured_card_with_little_in_it_is_drawn_too(address: str, visit: Open) -> None:
    page = visit(address)
    card = measured_card()
    card["artefact"]["recipe"] = card["quality"]["after"] = None
    card["speed"]["after"] = card["artefact"]["techniques"] = card["caveats"] = []
    pane = show_card(page, card)
    assert "the original was kept" in pane.inner_text()
    assert pane.get_by_role("link").count() == 0
    pane = show_card(page, {"schema_version": 1, "model": {"name": "half a card"}})
    assert "half a card" in pane.inner_text()


def test_the_server_gives_what_lies_beside_the_model(tmp_path: Path) -> None:
    app = FastAPI()
    add_card(app, lambda: tmp_path)
    with TestClient(app) as client:
        assert client.get("/card.json").status_code == client.get("/report.html").status_code == 404
        (tmp_path / "card.json").write_text('{"schema": 1}')
        answer = client.get("/card.json")
        assert answer.json() == {"schema": 1}
        assert "link" not in answer.headers
        (tmp_path / "report.html").write_text("<p>figures")
        assert client.get("/card.json").headers["link"] == '<report.html>; rel="alternate"'
        report = client.get("/report.html")
        assert report.text == "<p>figures"
        assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none';")


def test_a_report_is_shown_and_kept_from_the_page(browser: Any, tmp_path: Path) -> None:
    """Its charts are drawn; what it runs can neither ask the server nor read what the page keeps."""
    publish(make_card(), tmp_path)
    path = tmp_path / "report.html"
    spy = "try { localStorage.length; document.title = 'read'; } catch { document.title = 'kept'; }"
    path.write_text(
        path.read_text() + f"<script>{spy} fetch('card.json').catch(() => document.title += ' out');</script>"
    )
    app = FastAPI()
    add_card(app, lambda: tmp_path)
    with TestClient(app) as client:
        headers = client.get("/report.html").headers
    context = browser.new_context()
    page = context.new_page()
    page.route("http://report.test/**", lambda route: route.fulfill(path=path, headers=dict(headers)))
    page.goto("http://report.test/report.html")
    expect(page).to_have_title("kept out")
    assert page.locator("svg.pareto.wide .mark").count() == 8
    context.close()


# -- keys and safety -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def locked(demo_gguf: Path, browser: Any) -> Iterator[str]:
    """A server that wants a key."""
    with running(demo_gguf, "--api-key", KEY) as started:
        yield started


def test_a_key_is_asked_for_and_kept_in_the_tab(locked: str, visit: Open) -> None:
    page = visit(locked)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("did not accept")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    ask(page)
    answered(page)
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    assert KEY in page.evaluate("JSON.stringify(sessionStorage)")
    page.click("#tab-settings")
    page.get_by_role("button", name="Forget it").click()
    assert KEY not in page.evaluate("JSON.stringify(sessionStorage)")
    page.fill("#question", "Still there?")
    page.press("#question", "Enter")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert").filter(has_text="wants a valid API key")).to_be_visible()


def test_the_charts_show_a_real_server(locked: str, visit: Open) -> None:
    """Its own /metrics, behind its key."""
    page = visit(locked)
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    ask(page, tokens=300)
    charts = page.locator(".chart")
    expect(charts.nth(0).locator(".value")).to_have_text(re.compile(r"[1-9]"))
    expect(charts.nth(3).locator(".value")).to_have_text(re.compile(r"[1-9]\d* ms"))
    expect(charts.nth(2).locator(".value")).to_have_text(re.compile(r"^[0-9.]+%$"))
    page.keyboard.press("Escape")
    expect(charts.nth(1).locator(".value")).to_have_text("0 running0 waiting")


def test_nothing_of_the_page_is_inline_or_foreign(address: str, visit: Open) -> None:
    for file in WEB.iterdir():
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file
        foreign = [url for url in re.findall(r"https?://[^\s\"')]+", text) if "www.w3.org" not in url]
        assert foreign == [], file
    html = (WEB / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)
    page = visit(address)
    blocked = page.evaluate("""() => new Promise((resolve) => {
      document.addEventListener('securitypolicyviolation', (event) => resolve(event.violatedDirective), { once: true });
      try { document.body.innerHTML = '<b>x</b>'; } catch (error) { resolve(error.name); }
    })""")
    assert blocked
    policy = page.evaluate("fetch('.').then((r) => r.headers.get('content-security-policy'))")
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
