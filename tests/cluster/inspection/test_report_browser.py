"""The report in a real browser: it has no script, asks for nothing, and fits the window, light, dark and on paper."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tc_ray.inspection.report import report_page, sample_page
from tc_ray.inspection.samples import find_visits
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tests.support.browser import Browser, find_chromium, fresh_browser
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
    (folder / "report.html").write_text(report_page(log, texts), encoding="utf-8")
    (folder / "samples.html").write_text(
        sample_page(log.metadata, find_visits(log, [0, 1, 2]), texts), encoding="utf-8"
    )
    return folder / "report.html"


browser = fresh_browser()


@pytest.mark.parametrize("name", ["report.html", "samples.html"])
def test_it_loads_nothing_and_breaks_on_nothing(report: Path, browser: Browser, name: str) -> None:
    page = report.with_name(name)
    browser.open(page)
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.title") != "broken"
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 0


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
    assert len(boxes) == 4 and all(wide > 300 and high > 80 for wide, high in boxes)


@pytest.mark.parametrize("dark", [True, False])
def test_its_pictures_are_there_light_and_dark(report: Path, browser: Browser, dark: bool) -> None:
    browser.open(report, dark=dark, height=2600)
    picture = Image.open(io.BytesIO(browser.screenshot()))
    grey, colours = np.asarray(picture.convert("L"), np.float64), np.asarray(picture.convert("RGB"), np.int64)
    assert grey.shape == (2600, 1200)
    assert (np.median(grey) < 60) == dark and (np.median(grey) > 200) != dark
    warm = (colours[..., 0] - colours[..., 2]) > 90  # the scale of errors, drawn in the heat maps
    assert warm[800:2400].mean() > 0.01


def test_paper_is_light(report: Path, browser: Browser) -> None:
    browser.open(report, dark=True)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
