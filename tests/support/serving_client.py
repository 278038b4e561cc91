"""The serving app over the tiny export, in this process: settings, a client, and the events of a stream."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tc_ray.config.serving import ServingSection
from tc_ray.serving.deploy.replica import Replica
from tc_ray.serving.deploy.settings import ReplicaSettings
from tc_ray.serving.http.app import create_app

COMPLETION = {"model": "demo", "prompt": "Tom has 3 apples", "temperature": 0, "max_tokens": 12}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "12 + 345?"}], "temperature": 0, "max_tokens": 12}
SCORE = {"model": "demo", "prompt": "Tom has 3 apples", "completion": " and 3 pears"}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def settings_of(export: Path, *, keys: tuple[bytes, ...] = (), **fields: Any) -> ReplicaSettings:
    """Settings of a replica that serves the export as `demo`. fields: of the `serving` section."""
    section = ServingSection(**{"max_tokens": 64, "max_body_bytes": 100_000, "threads": 1, **fields})
    return ReplicaSettings({"demo": export}, section, keys)


def make_app(settings: ReplicaSettings) -> FastAPI:
    """The app, its models loaded."""
    return create_app(Replica(settings).registry, settings.serving, settings.key_digests)


@contextlib.contextmanager
def client_of(settings: ReplicaSettings) -> Iterator[TestClient]:
    """A client of the app, whose engine is closed at the end."""
    with TestClient(make_app(settings), raise_server_exceptions=False) as client:
        yield client


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app behind uvicorn on a free port of 127.0.0.1, in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "uvicorn did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def post(client: Any, path: str, body: dict[str, Any], **headers: str) -> Any:
    """The JSON of a successful answer."""
    response = client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def events(response: Any) -> list[Any]:
    """Data of a stream's events; the last must be [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]
