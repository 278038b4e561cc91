"""Models of the hub: one commit for all starts and nodes, the cache without the hub, and what is said where there is neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tc_ray.models.hub import fetch_model, on_this_node
from tc_ray.models.identity import ModelSourceError, snapshot_of, weights_hash
from tc_ray.run.inputs import fetch_models
from tests.support.hub_server import HubServer, hub_server
from tests.support.tiny_model import make_tiny_llama
from tests.support.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[3]
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has `own/tiny` in one commit, and an empty cache, as this process sees both."""
    from huggingface_hub import constants

    with hub_server() as server:
        files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.is_file()}
        server.commits["own/tiny"] = {OLD: {**files, "flax_model.msgpack": b"another format"}}
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def publish(server: HubServer) -> None:
    """A newer commit, of other weights."""
    files = dict(server.commits["own/tiny"][OLD])
    files["config.json"] = files["config.json"].replace(b"{", b'{"changed": true,', 1)
    server.commits["own/tiny"][NEW] = files


def downloads(server: HubServer) -> list[str]:
    return [path for command, path, _ in server.calls if command == "GET" and "/resolve/" in path]


def test_a_run_keeps_its_commit(hub: HubServer, tmp_path: Path) -> None:
    """The hub has moved on: a resume uses the commit that the run began with, a new run the newest."""
    config = tiny_config(tmp_path, model__pilot="own/tiny")
    (tmp_path / "run").mkdir()
    pilot, base, commits = fetch_models(config, tmp_path / "run")
    assert pilot == base and commits == {"own/tiny": OLD} and snapshot_of(pilot) == ("own/tiny", OLD)
    assert not (pilot / "flax_model.msgpack").exists() and (pilot / "model.safetensors").is_file()
    publish(hub)
    (tmp_path / "run" / "models.json").write_text(json.dumps(commits))
    again, _, _ = fetch_models(config, tmp_path / "run")
    assert again == pilot and weights_hash(again) == weights_hash(pilot)
    (tmp_path / "run" / "models.json").unlink()
    newest, _, commits = fetch_models(config, tmp_path / "run")
    assert commits == {"own/tiny": NEW} and weights_hash(newest) != weights_hash(pilot)


def test_a_node_without_it_fetches_the_same_commit_once(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    of_driver = fetch_model("own/tiny")
    assert on_this_node(of_driver) == of_driver
    shutil.rmtree(tmp_path / "cache")  # as another node sees it
    publish(hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "node"))
    hub.calls.clear()
    here = Path(on_this_node(of_driver))
    assert here.is_relative_to(tmp_path / "node") and snapshot_of(here) == ("own/tiny", OLD)
    fetched = downloads(hub)
    assert len(fetched) == len(set(fetched)) > 3
    assert on_this_node(of_driver) == here and downloads(hub) == fetched, "a second worker of the node fetches nothing"


def test_what_cannot_be_had_is_named(hub: HubServer) -> None:
    with pytest.raises(ModelSourceError, match=r"model own/absent cannot be had from the hub.*HF_TOKEN.*HF_HOME"):
        fetch_model("own/absent")


def test_offline_a_cached_snapshot_is_used(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own, as the library reads HF_HUB_OFFLINE once."""
    place = tmp_path / "hub" / "models--own--tiny"
    shutil.copytree(tiny, place / "snapshots" / OLD)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(OLD)
    code = """
import torch
from tc_ray.models.hub import fetch_model
from tc_ray.models.pilot.load import load_pilot
folder = fetch_model("own/tiny")
print(folder, sum(p.numel() for p in load_pilot(folder, dtype=torch.float32).parameters()))
try:
    fetch_model("own/absent")
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(str(place / "snapshots" / OLD)) and int(first.split()[-1]) > 1000
    assert second.startswith("ModelSourceError model own/absent cannot be had") and "HF_HUB_OFFLINE=1" in second
