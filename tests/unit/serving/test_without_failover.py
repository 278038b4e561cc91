"""A server behind a proxy without the failover proxy says so, as nothing else would in a Ray that others started."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

import tc_ray
from tc_ray.serving.deploy.launch import FAILOVER_PROXY, PROXY_CALLBACK_VARIABLE, Server, _warn_without_failover
from tc_ray.serving.deploy.settings import ReplicaSettings
from tc_ray.serving.failover.proxy import FAILOVER_HEADER
from tests.support.serving_client import served


@pytest.fixture(params=[True, False], ids=["with", "without"])
def proxy(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """Address of something that answers for health, and whether its answers say that they went through the failover proxy."""
    app = FastAPI()

    @app.get("/health")
    def health() -> Response:
        name, value = FAILOVER_HEADER
        return Response("{}", headers={name.decode(): value.decode()} if request.param else {})

    with served(app) as url:
        yield url, request.param


def test_what_is_said_of_a_proxy(proxy: tuple[str, bool]) -> None:
    url, there = proxy
    said: list[str] = []
    _warn_without_failover(Server(url, ReplicaSettings(models={}), False), said.append)
    assert len(said) == (not there)
    assert there or (said[0].startswith("warning: ") and f"{PROXY_CALLBACK_VARIABLE}=" in said[0])


def test_nothing_of_serving_imports_the_plug_in() -> None:
    serving = Path(tc_ray.__file__).parent / "serving"
    importing = {
        str(path.relative_to(serving))
        for path in serving.rglob("*.py")
        if re.search(r"^\s*(from|import) tc_ray\.serving\.failover", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importing <= {"failover/proxy.py"}


def test_the_middleware_is_in_the_place_that_the_docs_name() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    assert f"{PROXY_CALLBACK_VARIABLE}={FAILOVER_PROXY}" in page
