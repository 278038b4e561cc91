"""Replicas and Copilots are replaced while clients stream: none is cut, none is refused, and what comes later is the newer one.

Clients ask again and again over the whole update, so that some requests fall on every moment of it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from safetensors.torch import load_file, save_file

from tc_ray.export.check import copilot_version
from tc_ray.serving.deploy.deployment import build_application
from tc_ray.serving.deploy.launch import APPLICATION, Server
from tests.support.serving_cluster import PROMPT, Stream, replica_pids, server_of, soon
from tests.support.serving_samples import make_export

CLIENTS = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("made"), positions=1024)


@pytest.fixture
def server(made: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(made, tmp_path / "demo/export")
    options: dict[str, Any] = {"request_timeout_s": 120, "drain_s": 150, "cache_bytes": 2 * 10**8}
    with server_of([tmp_path / "demo"], replicas=2, threads=1, **options) as server:
        yield server


def train(export: Path) -> str:
    """Another Copilot in the folder, which corrects the other way; returns its version.

    Neither's text hangs on rounding: it stays the same while lambda moves by 0.001.
    """
    weights = export / "copilot/model.safetensors"
    tensors = load_file(weights)
    tensors["output.weight"] = -tensors["output.weight"]
    save_file(tensors, weights.with_suffix(".new"), metadata={"format": "pt"})
    weights.with_suffix(".new").rename(weights)
    return copilot_version(export)


def body_of(server: Server) -> dict[str, Any]:
    return {
        "model": next(iter(server.settings.models)),
        "prompt": PROMPT,
        "max_tokens": 100,
        "temperature": 0,
        "copilot": {"lambda": 2.0},
    }


def text_now(server: Server) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json=body_of(server), timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def versions(server: Server) -> set[str]:
    """Copilots that answer now: asked often enough to meet both replicas."""
    cards = [httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0] for _ in range(12)]
    return {card["copilot"]["version"] for card in cards}


def stream_during(server: Server, update: Callable[[], None]) -> list[Stream]:
    """Streams of clients that ask without a pause until the update is over, and what they got."""
    over, ended, gathering = threading.Event(), [], threading.Lock()

    def client() -> None:
        while not over.is_set():
            stream = Stream(server.url, body_of(server))
            stream.run()
            with gathering:
                ended.append(stream)

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for one in clients:
        one.start()
    try:
        time.sleep(1)
        update()
        time.sleep(1)
    finally:
        over.set()
        for one in clients:
            one.join(timeout=200)
    print(f"{len(ended)} streams, the longest {max(stream.seconds for stream in ended):.1f} s")
    return ended


def test_rolling_update_cuts_nothing(server: Server) -> None:
    expected, before = text_now(server), set(replica_pids())

    def redeploy() -> None:
        # as a changed config file does it: a new version of the code, one replica after the other
        serve.run(build_application(server.settings, version="2"), name=APPLICATION, route_prefix="/")
        assert soon(lambda: len(replica_pids()) == 2 and not before & set(replica_pids()), 200)

    ended = stream_during(server, redeploy)
    assert [stream.end for stream in ended] == ["[DONE]"] * len(ended)
    assert {stream.text for stream in ended} == {expected}
    assert len(ended) > CLIENTS


def test_newer_copilot_is_taken_up_without_a_pause(server: Server) -> None:
    [export] = server.settings.models.values()
    expected, before = text_now(server), set(replica_pids())
    new: list[str] = []

    def export_anew() -> None:
        new.append(train(export))
        server.reload()
        assert soon(lambda: versions(server) == set(new), 60)
        time.sleep(10)  # for streams that begin after it

    ended = stream_during(server, export_anew)
    assert set(replica_pids()) == before
    later = text_now(server)
    assert later != expected
    assert [stream.end for stream in ended] == ["[DONE]"] * len(ended)
    assert {stream.text for stream in ended} == {expected, later}
