"""The web page in a real browser against a real server: it shows what the API answers, asks for nothing else, fits, can be
stopped, and says what went wrong."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import Browser, find_chromium, fresh_browser
from tests.support.serving_process import ServingProcess
from tests.support.serving_samples import make_export
from tests.support.waiting import until

CHROMIUM = find_chromium()
KEY = "a key with two words"
PROMPT = "Tom has 3 apples.\nHow many are left?"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[ServingProcess]:
    with ServingProcess(export, max_tokens=2048) as server:
        yield server


browser = fresh_browser()


def until_page(browser: Browser, condition: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not browser.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        time.sleep(0.05)


def show(browser: Browser, server: ServingProcess, **options: Any) -> None:
    """Open the page and wait for its list of models."""
    browser.open(f"{server.address}/", **options)
    until_page(browser, "document.getElementById('model').options.length > 0")


def fill(browser: Browser, name: str, value: str) -> None:
    """Replace a field's text, as typing does."""
    browser.evaluate(f"document.getElementById('{name}').focus(); document.getElementById('{name}').select()")
    browser.type(value)


def choose(browser: Browser, name: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const field = document.getElementById('{name}'); field.value = '{value}';"
        " for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


def answer(browser: Browser) -> None:
    """Press the button and wait until both columns have ended."""
    browser.evaluate("document.getElementById('go').click()")
    until_page(browser, "!document.getElementById('go').disabled")


def column(browser: Browser, name: str) -> str:
    return str(browser.evaluate(f"document.querySelector('#{name} .answer').textContent"))


def asked(server: ServingProcess, path: str, body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    with urlopen(Request(f"{server.address}{path}", json.dumps(body).encode(), headers)) as response:
        return dict(json.load(response))


@pytest.mark.parametrize(("kind", "temperature", "lam"), [("chat", 0, 0.05), ("text", 0, 0.75), ("chat", 1, 0.5)])
def test_both_columns_are_what_the_api_answers(
    server: ServingProcess, browser: Browser, kind: str, temperature: float, lam: float
) -> None:
    show(browser, server)
    fill(browser, "prompt", PROMPT)
    fill(browser, "max-tokens", "40")
    fill(browser, "temperature", str(temperature))
    fill(browser, "seed", "11")
    choose(browser, "kind", kind)
    choose(browser, "lambda", str(lam))
    answer(browser)
    body: dict[str, Any] = {"model": "demo", "max_tokens": 40, "temperature": temperature, "seed": 11}
    path = "/v1/completions" if kind == "text" else "/v1/chat/completions"
    body |= {"prompt": PROMPT} if kind == "text" else {"messages": [{"role": "user", "content": PROMPT}]}
    shown = {}
    for name, weight in (("pilot", 0), ("fused", lam)):
        choice = asked(server, path, {**body, "copilot": {"lambda": weight, "explain": True}})["choices"][0]
        shown[name] = choice["text"] if kind == "text" else choice["message"]["content"]
        assert column(browser, name) == shown[name]
        facts = browser.evaluate(f"document.querySelector('#{name} .facts').textContent")
        assert facts.startswith("40 tokens · first after ") and " tokens/s" in facts
        levels = browser.evaluate(
            f"[...document.querySelectorAll('#{name} .unit')].map(u => u.className.match(/m(\\d)/)?.[1])"
        )
        moved = [token["moved"] for token in choice["copilot"]["tokens"]]
        assert len(levels) > 10 and None not in levels
        assert max(map(int, levels)) == min(int(10 * max(moved) ** 0.5), 9)
    assert shown["pilot"] != shown["fused"]
    assert browser.evaluate("document.querySelectorAll('.answer .parted').length") == 2
    assert browser.evaluate("document.getElementById('status').textContent").startswith("The answers part after ")
    backs = browser.evaluate(
        "['pilot', 'fused'].map(name => [...document.querySelectorAll(`#${name} .unit`)].map(u => getComputedStyle(u).backgroundColor))"
    )
    assert set(backs[0]) == {"rgba(0, 0, 0, 0)"}
    assert set(backs[0]).isdisjoint(backs[1]) and len(set(zip(backs[1], levels, strict=True))) == len(set(levels))
    static = ["", "page/style.css", "page/app.js", "page/answer.js", "page/stream.js", "page/tip.js", "page/icon.svg"]
    expected = [f"{server.address}/{name}" for name in [*static, "v1/models"]] + 2 * [f"{server.address}{path}"]
    assert sorted(browser.requests) == sorted(expected)
    assert browser.complaints == [] and browser.blocked == []


def test_the_tip_tells_a_token_to_pointer_and_keys(server: ServingProcess, browser: Browser) -> None:
    show(browser, server)
    fill(browser, "prompt", PROMPT)
    fill(browser, "max-tokens", "20")
    answer(browser)
    lam = browser.evaluate("Number(document.getElementById('lambda').value)")
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "temperature": 0}
    told = asked(server, "/v1/chat/completions", {**body, "copilot": {"lambda": lam, "explain": True}})
    tokens = told["choices"][0]["copilot"]["tokens"]
    place = browser.evaluate(
        "[...document.querySelectorAll('#fused .unit')].findIndex(u => /^[ -~]+$/.test(u.textContent))"
    )
    assert place >= 0
    text = browser.evaluate(f"document.querySelectorAll('#fused .unit')[{place}].textContent")
    x, y = browser.evaluate(
        f"(() => {{ const u = document.querySelectorAll('#fused .unit')[{place}]; u.scrollIntoView({{block: 'center'}});"
        " const b = u.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    browser.move(x, y)
    until_page(browser, "!document.getElementById('tip').hidden")
    figures = browser.evaluate("[...document.querySelectorAll('#tip dd')].map(d => d.textContent)")
    [token] = [t for t in tokens if t["token"] == text and f"{t['moved']:.4f}" == figures[4]][:1]
    assert figures[0] == f"“{text.replace(' ', '␣')}”"
    assert figures[2].startswith(f"{100 * token['pilot']:.1f}"[:3]) and figures[3].startswith(
        f"{100 * token['fused']:.1f}"[:3]
    )
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('tip').hidden")
    browser.evaluate("document.querySelector('#fused .unit').focus()")
    assert not browser.evaluate("document.getElementById('tip').hidden")
    browser.press("ArrowRight")
    assert browser.evaluate("document.activeElement === document.querySelectorAll('#fused .unit')[1]")
    assert browser.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.press("End")
    assert browser.evaluate("document.activeElement === [...document.querySelectorAll('#fused .unit')].at(-1)")


def test_before_the_first_answer(server: ServingProcess, browser: Browser) -> None:
    """Both panes looked busy from the load on: a caret blinked where the words should stand."""
    show(browser, server)
    assert browser.evaluate("document.querySelectorAll('.answer[aria-busy]').length") == 0
    shown = "getComputedStyle(document.querySelector('#pilot .answer'), '::before').content"
    assert "The answer comes here." in browser.evaluate(shown)
    browser.evaluate("document.querySelector('.example').click()")
    assert browser.evaluate("document.getElementById('prompt').value").startswith("Tom has 3 apples")


@pytest.mark.parametrize("how", ["button", "key"])
def test_a_stopped_answer_is_stopped_in_the_server_too(server: ServingProcess, browser: Browser, how: str) -> None:
    show(browser, server)
    fill(browser, "prompt", PROMPT)
    fill(browser, "max-tokens", "2000")
    browser.press("Enter", ctrl=True)
    until_page(browser, "document.querySelectorAll('#fused .unit').length > 5")
    browser.evaluate("document.getElementById('stop').click()") if how == "button" else browser.press("Escape")
    until_page(browser, "document.getElementById('status').textContent === 'Stopped.'")
    assert "stopped" in browser.evaluate("document.querySelector('#fused .facts').textContent")
    assert browser.evaluate("document.querySelectorAll('#fused .unit').length") < 1900
    until(lambda: running(server) == 0)


def running(server: ServingProcess) -> float:
    """Sequences in the engine's batch."""
    with urlopen(f"{server.address}/running") as response:
        return float(response.read())


def test_refusals_and_a_dead_server_are_said(export: Path, browser: Browser) -> None:
    with ServingProcess(export, max_tokens=2048) as server:
        show(browser, server)
        fill(browser, "prompt", PROMPT)
        fill(browser, "max-tokens", "3000")
        answer(browser)
        for name in ("pilot", "fused"):
            trouble = browser.evaluate(f"document.querySelector('#{name} .trouble').textContent")
            assert "max_tokens" in trouble and "2048" in trouble
        fill(browser, "max-tokens", "2000")
        browser.evaluate("document.getElementById('go').click()")
        until_page(browser, "document.querySelectorAll('#fused .unit').length > 5")
        server.process.kill()
        until_page(browser, "!document.getElementById('go').disabled")
        for name in ("pilot", "fused"):
            assert "not complete" in browser.evaluate(f"document.querySelector('#{name} .trouble').textContent")
        assert browser.evaluate("document.getElementById('status').textContent") == "Not complete."
        answer(browser)
        assert "cannot be reached" in browser.evaluate("document.querySelector('#pilot .trouble').textContent")


def test_with_a_key_the_page_asks_for_it_and_keeps_it_in_the_tab_only(export: Path, browser: Browser) -> None:
    with ServingProcess(export, key=KEY) as server:
        browser.open(f"{server.address}/")
        until_page(browser, "!document.getElementById('key-trouble').hidden")
        assert "asks for a key" in browser.evaluate("document.getElementById('key-trouble').textContent")
        for given, hidden in (("wrong", False), (KEY, True)):
            fill(browser, "key", given)
            browser.evaluate("document.getElementById('key').dispatchEvent(new Event('change'))")
            until_page(browser, f"document.getElementById('key-trouble').hidden === {json.dumps(hidden)}")
        until_page(browser, "document.getElementById('model').options.length > 0")
        fill(browser, "prompt", PROMPT)
        fill(browser, "max-tokens", "10")
        answer(browser)
        body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 10, "temperature": 0}
        told = asked(server, "/v1/chat/completions", {**body, "copilot": {"lambda": 0}}, KEY)
        assert column(browser, "pilot") == told["choices"][0]["message"]["content"]
        assert browser.evaluate("localStorage.length") == 0 and browser.evaluate("document.cookie") == ""
        assert all("key" not in address for address in browser.requests)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 400, 800, 1200, 1900])
def test_it_fits_the_window_light_and_dark(server: ServingProcess, browser: Browser, width: int, dark: bool) -> None:
    show(browser, server, width=width, dark=dark)
    fill(browser, "prompt", PROMPT)
    fill(browser, "max-tokens", "60")
    answer(browser)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = browser.evaluate("['pilot', 'fused'].map(n => document.getElementById(n).getBoundingClientRect().toJSON())")
    beside = boxes[0]["y"] == boxes[1]["y"]
    assert beside == (width > 720)
    picture = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"), np.float64)
    assert (np.median(picture) < 60) == dark and (np.median(picture) > 200) != dark
