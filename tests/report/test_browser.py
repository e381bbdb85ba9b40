"""A report in a real browser: on wide screens, phones, paper, in the dark; nothing overlaps, nothing is fetched."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import write_small_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE, TABLET, PHONE = 1440, 820, 390

# Everything that is read or looked at, where it is on the page; what is in a closed details has no size.
BOXES = """() => [...document.querySelectorAll(
  'h1, h2, h3, p, figure svg, caption span, th, td, dt, dd, summary, .thumb span, .thumb img')]
  .map(e => { const r = e.getBoundingClientRect(); return {
    what: e.tagName + ' ' + (e.alt || e.textContent).slice(0, 60),
    x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, in_table: !!e.closest('table') }; })
  .filter(b => b.width > 1 && b.height > 1)"""
FIGURES = """() => [...document.querySelectorAll('figure svg')].map(e => {
  const frame = e.getBoundingClientRect();
  return { left: frame.left, right: frame.right, ratio: frame.width / frame.height,
  drawn: e.viewBox.baseVal.width / e.viewBox.baseVal.height,
  texts: [...e.querySelectorAll('text')].map(t => { const r = t.getBoundingClientRect(), m = t.getScreenCTM();
    return { what: t.textContent, x: r.x, y: r.y, width: r.width, height: r.height, ink: getComputedStyle(t).fill,
             font: getComputedStyle(t).fontFamily, inside: r.left > frame.left - 1 && r.right < frame.right + 1,
             size: parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.a, m.b) }; }) }; })"""
COLOURS = """() => [...document.querySelectorAll(
  'h1, h2, h3, p, a, th, td, dt, dd, summary, caption, strong, .thumb span')]
  .filter(e => e.getBoundingClientRect().width > 1).map(e => {
    let behind = e; const clear = 'rgba(0, 0, 0, 0)';
    while (behind && getComputedStyle(behind).backgroundColor === clear) behind = behind.parentElement;
    return { what: e.tagName + ' ' + e.textContent.slice(0, 40), ink: getComputedStyle(e).color,
             paper: behind ? getComputedStyle(behind).backgroundColor : 'rgb(255, 255, 255)' }; })"""


@dataclass
class Seen:
    """A page that is open, and what it asked for and complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the path")
    api = pytest.importorskip("playwright.sync_api", reason="needs ntkpipe[dev]")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def show(browser: Any, report: Path) -> Iterator[Any]:
    """A function that opens the page; one that is open already is taken, unless it shall be fresh."""
    contexts, found = [], {}

    def opened(width: int, *, scheme: str = "light", media: str = "screen", fresh: bool = False) -> Seen:
        if not fresh and (width, scheme) in found:
            seen = found[width, scheme]
            seen.page.emulate_media(media=media, color_scheme=scheme)
            return seen
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.complaints.append(message.text))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.emulate_media(media=media, color_scheme=scheme)
        seen.page.goto(report.as_uri())
        if not fresh:
            found[width, scheme] = seen
        return seen

    yield opened
    for context in contexts:
        context.close()


def test_nothing_is_asked_of_a_network_and_nothing_is_wrong(show: Any, report: Path) -> None:
    for width, scheme in ((WIDE, "light"), (PHONE, "dark")):
        seen = show(width, scheme=scheme, fresh=True)
        asked = [url for url in seen.requests if not url.startswith("data:")]
        assert asked == [report.as_uri()]
        assert seen.complaints == []


@pytest.mark.parametrize("width", [WIDE, TABLET, PHONE, 320])
def test_the_page_is_no_wider_than_the_screen(show: Any, width: int) -> None:
    page = show(width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = page.evaluate(FIGURES)
    assert len(figures) > 5
    for figure in figures:
        # On the narrowest of phones a figure is wider than its frame, and scrolls.
        assert 0 <= figure["left"] <= figure["right"] <= max(width, 370)
        assert figure["ratio"] == pytest.approx(figure["drawn"], rel=0.02)


@pytest.mark.parametrize("width", [WIDE, TABLET, PHONE])
def test_nothing_overlaps(show: Any, width: int) -> None:
    page = show(width, fresh=True).page
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for media in ("screen", "print"):
        page.emulate_media(media=media)
        boxes = page.evaluate(BOXES)
        assert len(boxes) > 100
        require_apart(boxes)
        for figure in page.evaluate(FIGURES):
            require_apart(figure["texts"])


def require_apart(boxes: list[dict[str, Any]]) -> None:
    edges = np.array([(b["x"], b["y"], b["x"] + b["width"], b["y"] + b["height"]) for b in boxes])
    starts = np.maximum(edges[:, None, :2], edges[None, :, :2])
    shared = np.minimum(edges[:, None, 2:], edges[None, :, 2:]) - starts
    # Neighbouring cells share an edge; lines of a legend, boxes of whole lines, touch.
    overlap = np.argwhere(np.triu((shared > 1).all(axis=2), k=1))
    assert not len(overlap), [[boxes[i] for i in pair] for pair in overlap[:3]]


def test_figures_are_dark_on_dark_screens_and_light_on_paper(show: Any) -> None:
    for scheme, media, is_dark in (("dark", "print", False), ("light", "screen", False), ("dark", "screen", True)):
        page = show(WIDE, scheme=scheme, media=media).page
        paper = brightness(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        inks = [brightness(text["ink"]) for figure in page.evaluate(FIGURES) for text in figure["texts"]]
        assert len(inks) > 50
        assert (paper < 0.05 and min(inks) > 0.7) if is_dark else (paper > 0.9 and max(inks) < 0.05)


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_words_in_figures_are_in_the_font_of_the_page_and_large_enough(show: Any, width: int) -> None:
    page = show(width).page
    font = page.evaluate("getComputedStyle(document.body).fontFamily")
    texts = [text for figure in page.evaluate(FIGURES) for text in figure["texts"]]
    assert {text["font"] for text in texts} == {font}
    assert min(text["size"] for text in texts) >= 11
    assert all(text["inside"] for text in texts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(show: Any, scheme: str) -> None:
    found = show(WIDE, scheme=scheme).page.evaluate(COLOURS)
    assert len(found) > 100
    for text in found:
        lights = sorted(brightness(text[name]) for name in ("ink", "paper"))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, text


def test_keys_reach_the_content_and_wide_tables(show: Any) -> None:
    page = show(PHONE, fresh=True).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert page.evaluate(f"{wide}.length") > 0
    assert page.evaluate(f"{wide}.every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))")


def test_it_prints(show: Any) -> None:
    data = show(WIDE, scheme="dark").page.pdf(format="A4", prefer_css_page_size=True)
    assert data.startswith(b"%PDF")
    assert 4 <= data.count(b"/Type /Page\n") <= 30


def brightness(colour: str) -> float:
    """Relative luminance of WCAG 2 of ``rgb(r, g, b)``."""
    values = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
