"""The web page as files: what the router sends, that it loads nothing from elsewhere, and that its colours can be read."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tc_ray.serving.page.route import router
from tests.support.colours import contrast

STATIC = files("tc_ray.serving.page").joinpath("static")
MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "tip.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
TEXTS = {name: STATIC.joinpath(name).read_text("utf-8") for name in MEDIA_TYPES}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def test_each_file_comes_with_its_type_and_a_policy_that_lets_nothing_in(client: TestClient) -> None:
    assert {path.name for path in STATIC.iterdir()} == set(MEDIA_TYPES)
    for name, media_type in MEDIA_TYPES.items():
        answer = client.get("/" if name == "index.html" else f"/page/{name}")
        assert answer.status_code == 200
        assert answer.text == TEXTS[name]
        assert answer.headers.get_list("content-type") == [media_type]
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/index.html",
        "/page/route.py",
        "/page/../route.py",
        "/page/%2e%2e%2froute.py",
        "/page//etc/passwd",
    ],
)
def test_no_other_path_gives_a_file(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_is_no_part_of_the_api_document(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


def test_nothing_in_the_files_points_elsewhere_or_needs_inline_code() -> None:
    for name, text in TEXTS.items():
        addresses = re.findall(
            r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
        )
        assert [address for address in addresses if not address.startswith("http://www.w3.org/2000/svg")] == [], name
    page = TEXTS["index.html"]
    assert re.findall(r"<script(?![^>]* src=)[^>]*>|<style|\sstyle=|\son\w+=", page) == []
    used = re.findall(r'(?:src|href)="page/([\w.]+)"', page) + re.findall(r'from "\./([\w.]+)"', TEXTS["app.js"])
    assert set(used) | {"index.html"} == set(MEDIA_TYPES)
    for script in ("app.js", "answer.js", "stream.js", "tip.js"):
        assert (
            re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage", TEXTS[script])
            == []
        )


def test_every_field_has_a_label_and_every_id_the_script_asks_for_is_there() -> None:
    page = TEXTS["index.html"]
    ids = re.findall(r'\sid="([\w-]+)"', page)
    assert len(ids) == len(set(ids))
    fields = re.findall(r'<(?:input|select|textarea) id="([\w-]+)"', page)
    assert len(fields) == 8
    assert set(fields) <= set(re.findall(r'<label for="([\w-]+)"', page))
    assert set(re.findall(r'find\("([\w-]+)"\)', TEXTS["app.js"])) <= set(ids)


@pytest.mark.parametrize("dark", [False, True])
def test_text_on_each_colour_can_be_read(dark: bool) -> None:
    blocks = re.findall(r":root \{(.*?)\}", TEXTS["style.css"], flags=re.DOTALL)
    colours = {
        name: value if len(value) == 7 else "#" + "".join(2 * digit for digit in value[1:])
        for name, value in re.findall(r"--([\w-]+): (#[0-9a-f]+);", blocks[dark])
    }
    ink_of_level = re.findall(r"\.(m\d) \{ background: var\(--\1\); color: var\(--(\w+)\); \}", TEXTS["style.css"])
    assert [level for level, _ in ink_of_level] == [f"m{level}" for level in range(1, 10)]
    pairs = [(colours[ink], colours[level]) for level, ink in ink_of_level]
    pairs += [(colours[ink], colours[back]) for ink in ("ink", "soft", "accent") for back in ("back", "panel")]
    pairs += [(colours["on-accent"], colours["accent"]), (colours["bad"], colours["bad-back"])]
    assert [pair for pair in pairs if contrast(*pair) < 4.5] == []
