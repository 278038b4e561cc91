"""Options of a server, and the config files and builder that use them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tc_ray.serving.deploy.options import OPTIONS, build_settings
from tc_ray.serving.errors import ServingError
from tc_ray.serving.settings import EngineLimits, Limits, ReplicaSettings, Scale
from tests.support.serving_samples import make_export

ROOT = Path(__file__).resolve().parents[3]


def test_defaults_are_those_of_the_settings() -> None:
    assert build_settings((), (), dict.fromkeys(OPTIONS)) == (ReplicaSettings(models=()), Scale())


def test_options_become_settings() -> None:
    options = {"max_tokens": 7, "request_timeout_s": 20, "max_running": 3, "max_waiting": 0, "cache_mb": 2}
    settings, scale = build_settings((), (b"k",), {**options, "watch_s": 0, "min_replicas": 2, "max_replicas": 4})
    assert settings.limits == Limits(max_tokens=7, request_timeout_s=20)
    assert settings.engine == EngineLimits(max_running=3, max_waiting=0, cache_bytes=2 * 2**20)
    assert (settings.watch_s, settings.drain_s, settings.key_digests) == (None, 50.0, (b"k",))
    assert scale == Scale(2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_token": 5}, "unknown option max_token; did you mean max_tokens?"),
        ({"zzz": 5}, "unknown option zzz$"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"max_tokens": True}, "max_tokens must be a whole number"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number"),
        ({"max_running": 0}, "max_running 0 must be more than 0"),
        ({"max_waiting": -1}, "max_waiting -1 must be 0 or more"),
        ({"gpu": 1}, "gpu must be true or false"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s must be a number"),
        ({"request_timeout_s": 10, "drain_s": 9}, "drain_s 9 is shorter than request_timeout_s 10"),
        ({"replicas": 2, "min_replicas": 1}, "not both"),
        ({"min_replicas": 2}, "min_replicas needs max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas 2 is less than min_replicas 3"),
    ],
)
def test_refusals_name_the_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ServingError, match=words):
        build_settings((), (), options)


def build(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    import serve_app

    return serve_app.build(arguments)


def test_builder_makes_the_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TC_RAY_API_KEY", "k")
    run = make_export(tmp_path / "run", positions=64).parent
    arguments = {"runs": [str(run)], "max_running": 4, "max_waiting": 6, "request_timeout_s": 30, "max_replicas": 3}
    deployment = build(monkeypatch, arguments)._bound_deployment
    config = deployment._deployment_config
    assert config.max_ongoing_requests > 4 * (4 + 6) and config.graceful_shutdown_timeout_s > 30
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 3)
    assert config.autoscaling_config.target_ongoing_requests == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "args.runs must be a list"),
        ({"runs": "one"}, "args.runs must be a list"),
        ({"runs": ["absent"]}, "is no folder"),
        ({"runs": ["RUN"], "max_token": 5}, "unknown option max_token; did you mean max_tokens"),
        ({"runs": ["RUN"], "folder": "x"}, "unknown option folder"),
    ],
)
def test_builder_refuses_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("TC_RAY_API_KEY", "k")
    if arguments.get("runs") == ["RUN"]:
        arguments = {**arguments, "runs": [str(make_export(tmp_path / "run", positions=64))]}
    with pytest.raises(ServingError, match=words):
        build(monkeypatch, arguments)


def test_builder_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TC_RAY_API_KEY", raising=False)
    run = str(make_export(tmp_path / "run", positions=64))
    with pytest.raises(ServingError, match="no API key is set"):
        build(monkeypatch, {"runs": [run]})
    assert build(monkeypatch, {"runs": [run], "allow_open": True}) is not None


def serve_configs() -> dict[str, dict[str, Any]]:
    """The Serve config files of the repository: one by itself, one inside the Kubernetes manifest."""
    manifest = yaml.safe_load((ROOT / "cluster/rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((ROOT / "cluster/serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(manifest["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_config_files_are_what_serve_and_the_builder_take(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve.schema import ServeDeploySchema

    document = serve_configs()[name]
    ServeDeploySchema.model_validate(document)
    [application] = document["applications"]
    run = make_export(tmp_path / "run", positions=64).parent
    monkeypatch.setenv("TC_RAY_API_KEY", "k")
    made = build(monkeypatch, {**application["args"], "runs": [str(run)]})
    assert application["import_path"] == "serve_app:build"
    assert {one["name"] for one in application["deployments"]} == {made._bound_deployment.name}
    assert "serve_app" in sys.modules
