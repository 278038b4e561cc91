"""A server behind a proxy without the stream guard says so: in a Ray that others started nobody else would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from tc_ray.serving.deploy.launch import Server, _warn_unguarded
from tc_ray.serving.failover.proxy import GUARD_HEADER, PROXY_CALLBACK_VARIABLE
from tc_ray.serving.settings import ReplicaSettings
from tests.support.serving_client import served


@pytest.fixture(params=[True, False], ids=["guarded", "unguarded"])
def proxy(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """Address of something that answers for health, and whether the guard's mark is on its answers."""
    app = FastAPI()

    @app.get("/health")
    def health() -> Response:
        name, value = GUARD_HEADER
        return Response("{}", headers={name.decode(): value.decode()} if request.param else {})

    with served(app) as url:
        yield url, request.param


def test_what_is_said_of_a_proxy(proxy: tuple[str, bool]) -> None:
    url, guarded = proxy
    said: list[str] = []
    _warn_unguarded(Server(url, ReplicaSettings(models=()), False), said.append)
    assert len(said) == (not guarded)
    assert guarded or (said[0].startswith("warning: ") and f"{PROXY_CALLBACK_VARIABLE}=" in said[0])


def test_the_middleware_is_in_the_place_that_the_docs_name() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    from tc_ray.serving.failover import proxy as guard

    assert f"{PROXY_CALLBACK_VARIABLE}={guard.PROXY_CALLBACK}" in page
