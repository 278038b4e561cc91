"""The report in a real browser: it draws without a script, asks for nothing, answers the pointer and fits the window."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tc_ray.inspection.report import write_report
from tc_ray.inspection.sample_page import sample_page
from tc_ray.inspection.sights import find_sights
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tests.support.browser import Browser, find_chromium
from tests.support.inspection_samples import make_examples, make_log
from tests.support.tiny_model import make_tokenizer

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


class Hostile(TokenTexts):
    """Every third token tries to run a script or to load something."""

    def raw(self, token: int) -> str:
        evil = ("</script><script>document.title='broken'</script>", "<img src=http://127.0.0.1:9/x onerror=alert(1)>")
        return super().raw(token) if token % 3 else evil[token % 2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    log = MistakeLog(
        make_log(folder / "log", make_examples(samples=30, epochs=4, vocab=120, longest=12), rounds_a_file=20)
    )
    texts = Hostile(make_tokenizer(), "tokenizer of the test")
    write_report(log, texts, folder / "report.html")
    (folder / "samples.html").write_text(
        sample_page(log.metadata, find_sights(log, [0, 1, 2]), texts), encoding="utf-8"
    )
    return folder / "report.html"


@pytest.fixture
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as opened:
        yield opened


@pytest.mark.parametrize("name", ["report.html", "samples.html"])
def test_it_loads_nothing_and_breaks_on_nothing(report: Path, browser: Browser, name: str) -> None:
    page = report.with_name(name)
    browser.open(page)
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.title") != "broken"
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 2


def test_its_policy_forbids_what_it_does_not_do(report: Path, browser: Browser, tmp_path: Path) -> None:
    """The other half of the test above: were a text to get through, the browser would still refuse it."""
    broken = tmp_path / "broken.html"
    evil = "<script>document.title='broken'</script><img src='http://127.0.0.1:9/x'></body>"
    broken.write_text(report.read_text(encoding="utf-8").replace("</body>", evil), encoding="utf-8")
    browser.open(broken)
    assert browser.evaluate("document.title") != "broken"
    assert len([text for text in browser.complaints if "Content Security Policy" in text]) == 2
    assert browser.blocked == [("http://127.0.0.1:9/x", "csp")]


@pytest.mark.parametrize("width", [390, 800, 1200, 1900])
def test_it_fits_the_window(report: Path, browser: Browser, width: int) -> None:
    browser.open(report, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = browser.evaluate("[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight])")
    assert len(boxes) == 5 and all(wide > 300 and high > 80 for wide, high in boxes)


def test_the_pointer_and_the_arrow_keys_tell_the_figures(report: Path, browser: Browser) -> None:
    browser.open(report)
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', report.read_text("utf-8")).group(1))  # type: ignore[union-attr]
    chart = charts["errors"]
    column, row = 17, 1
    browser.evaluate("document.querySelector('svg[data-chart=errors]').scrollIntoView({block: 'center'})")
    x, y = browser.evaluate(
        "(() => { const p = new DOMPoint({x}, {y}).matrixTransform(document.querySelector('svg[data-chart=errors]').getScreenCTM());"
        " return [p.x, p.y]; })()".replace(
            "{x}, {y}",
            f"{chart['left'] + chart['width'] * (column + 0.5) / len(chart['xs'])}, "
            f"{chart['top'] + chart['height'] * (row + 0.5) / len(chart['ys'])}",
        )
    )
    browser.move(x, y)
    assert browser.evaluate("getComputedStyle(document.getElementById('tip')).visibility") == "visible"
    index = row * len(chart["xs"]) + column
    assert told(browser) == [
        "round 18, token 2",
        f"mean error: {100 * chart['layers'][0]['values'][index]:.1f}%",
        f"answers that reach it: {chart['layers'][1]['values'][index]}",
    ]
    browser.evaluate("document.querySelector('svg[data-chart=errors]').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowDown")
    assert told(browser)[0] == "round 19, token 3"
    browser.move(1, 1)
    assert browser.evaluate("getComputedStyle(document.getElementById('tip')).visibility") == "hidden"


def told(browser: Browser) -> list[str]:
    return str(browser.evaluate("document.getElementById('tip').textContent")).split("\n")


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("dark", [True, False])
def test_its_pictures_are_there_light_and_dark_with_and_without_script(
    report: Path, browser: Browser, dark: bool, script: bool
) -> None:
    browser.open(report, dark=dark, script=script, height=2600)
    picture = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"), np.float64)
    assert picture.shape == (2600, 1200)
    assert (np.median(picture) < 60) == dark and (np.median(picture) > 200) != dark
    colours = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"), np.int64)
    warm = (colours[..., 0] - colours[..., 2]) > 90  # the scale of errors, drawn in the heat maps
    assert warm[800:2400].mean() > 0.01
