"""The report as a browser shows it: at two widths, light and dark, alone, and legible."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tierbench.cli import main
from tierbench.record import RESULTS

from tests.support.browser import Browser, find_browser, running_browser

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed to look with")

OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, .unseen, .skip, svg'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && e.getBoundingClientRect().width > 0)
  .map(e => e.tagName + '.' + e.className).slice(0, 5)
"""
COLOURS = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('svg, .unseen, .skip'))
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    let under = e, behind = 'rgba(0, 0, 0, 0)';
    while (under && behind.endsWith(', 0)')) {
      behind = getComputedStyle(under).backgroundColor;
      under = under.parentElement;
    }
    return [e.tagName + '.' + e.className, getComputedStyle(e).color, behind];
  })
"""
SMALLEST_LETTERS = (
    "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
)
REQUEST = "Network.requestWillBeSent"
COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
SETTINGS = [(1280, False), (390, False), (1280, True), (390, True)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(RESULTS), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert BROWSER is not None
    with running_browser(BROWSER, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize(("width", "dark"), SETTINGS)
def test_the_page_fits_and_is_drawn(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(SMALLEST_LETTERS) >= 11
    picture = base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"])
    assert len(set(_pixels(picture))) > 50  # text and charts, not a blank sheet


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(browser: Browser, page: Path, dark: bool) -> None:
    """WCAG AA: 4.5 to 1 for all text, small or not."""
    browser.open(page, width=1280, dark=dark)
    found = browser.evaluate(COLOURS)
    assert len(found) > 100
    weak = {(name, colour, behind) for name, colour, behind in found if _contrast(colour, behind) < 4.5}
    assert weak == set()
    assert _luminance(found[0][2]) < 0.1 if dark else _luminance(found[0][2]) > 0.8


def test_nothing_is_fetched_and_nothing_is_complained_of(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, dark=False)
    requests = [e["params"]["request"] for e in browser.events if e.get("method") == REQUEST]
    asked = {request["url"] for request in requests}
    assert asked == {page.resolve().as_uri()}
    complaints = [e for e in browser.events if e.get("method") in COMPLAINTS]
    assert complaints == []


def _pixels(picture: bytes) -> list[tuple[int, ...]]:
    from io import BytesIO

    from matplotlib import image

    found: Any = image.imread(BytesIO(picture), format="png")
    return [tuple(p) for p in (found[::3, ::3, :3] * 255).astype(int).reshape(-1, 3).tolist()]


def _luminance(colour: str) -> float:
    parts = [float(p) / 255 for p in re.findall(r"[\d.]+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
