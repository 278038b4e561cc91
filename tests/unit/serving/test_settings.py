"""Settings of a server: recipe, config file, overrides, and the `args` of a Serve config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.serving import ServingSection
from tc_ray.config.yaml_file import ConfigError
from tc_ray.serving.deploy.deployment import build
from tc_ray.serving.deploy.settings import command_settings
from tc_ray.serving.errors import ServingError
from tests.support.kustomize import documents_in, render
from tests.support.serving_samples import make_export

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_export(tmp_path / "run", positions=64).parent


def recipe(run: Path, **serving: Any) -> None:
    """Leave a recipe in a run's export, as `tc-ray train` does."""
    config = RunConfig()
    config.serving = ServingSection(**serving)
    save_config(config, run / "export/config.yaml")


def test_the_recipe_of_a_run_gives_the_defaults_and_overrides_win(run: Path) -> None:
    assert command_settings([str(run)]).serving == ServingSection()
    recipe(run, max_tokens=7, max_running=3)
    settings = command_settings([f"demo={run}", "serving.max_tokens=9", "serving.key_file=null"])
    assert settings.serving == ServingSection(max_tokens=9, max_running=3)
    assert settings.models == {"demo": run / "export"}


def test_a_config_file_counts_instead_of_the_recipe(run: Path, tmp_path: Path) -> None:
    recipe(run, max_tokens=7, max_running=3)
    file = tmp_path / "serve.yaml"
    file.write_text("pilot: {no_such: 1}\nserving: {max_tokens: 8}\n")
    assert command_settings([str(run), "serving.threads=2"], file).serving == ServingSection(max_tokens=8, threads=2)
    file.write_text("serving:\n  max_token: 8\n")
    with pytest.raises(
        ConfigError, match=r"serve.yaml, line 2: unknown key serving.max_token; did you mean serving.max"
    ):
        command_settings([str(run)], file)
    file.write_text("servng: {max_tokens: 8}\n")
    with pytest.raises(ConfigError, match=r"line 1: unknown key servng"):
        command_settings([str(run)], file)


def test_recipes_of_several_runs_must_agree_on_what_is_not_overridden(run: Path, tmp_path: Path) -> None:
    other = make_export(tmp_path / "other", positions=64).parent
    recipe(run, max_tokens=7, threads=2)
    recipe(other, max_tokens=8, threads=2)
    with pytest.raises(ServingError, match=r"differ in serving.max_tokens: set it .* --config"):
        command_settings([str(run), str(other)])
    assert command_settings([str(run), str(other), "serving.max_tokens=9"]).serving.threads == 2


def test_a_recipe_that_was_cut_off_is_refused(run: Path) -> None:
    recipe(run)
    file = run / "export/config.yaml"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ConfigError, match="cut off"):
        command_settings([str(run)])


def test_times_and_replicas() -> None:
    assert (ServingSection().drain_time_s, ServingSection(drain_s=700).drain_time_s) == (630, 700)
    assert (ServingSection(replicas=2).most_replicas, ServingSection(max_replicas=4).most_replicas) == (2, 4)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("max_tokens=1.5", "serving.max_tokens is 1.5: it should be a valid integer"),
        ("max_running=0", "greater than 0"),
        ("max_waiting=-1", "greater than or equal to 0"),
        ("port=70000", "less than or equal to 65535"),
        ("max_body_bytes=20000000", "less than or equal to 16777216"),
        ("gpu=1.5", "valid boolean"),
        ("request_timeout_s=.nan", "finite"),
    ],
)
def test_refusals_name_the_field(run: Path, setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        command_settings([str(run), f"serving.{setting}"])


def test_builder_makes_the_deployment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TC_RAY_API_KEY", "k")
    arguments = {"runs": [str(run)], "max_running": 4, "max_waiting": 6, "request_timeout_s": 30, "max_replicas": 3}
    deployment = build(arguments)._bound_deployment
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
        (
            {"runs": ["RUN"], "max_token": 5},
            "args.max_token: unknown key serving.max_token; did you mean serving.max_to",
        ),
        (
            {"runs": ["RUN"], "max_tokens": "five"},
            "args.max_tokens: serving.max_tokens is 'five': it should be a valid integer",
        ),
        ({"runs": ["RUN"], "port": 80}, "args.port: the http_options"),
    ],
)
def test_builder_refuses_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("TC_RAY_API_KEY", "k")
    if arguments.get("runs") == ["RUN"]:
        arguments = {**arguments, "runs": [str(make_export(tmp_path / "run", positions=64))]}
    with pytest.raises((ServingError, ConfigError), match=words):
        build(arguments)


def test_builder_needs_a_key(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TC_RAY_API_KEY", raising=False)
    with pytest.raises(ServingError, match="no API key is set"):
        build({"runs": [str(run)]})
    assert build({"runs": [str(run)], "allow_open": True}) is not None


def serve_configs() -> dict[str, dict[str, Any]]:
    """The Serve config files of the repository: one by itself, those inside the Kubernetes manifests."""
    kuberay = ROOT / "cluster/kuberay"
    [cpu], [gpu] = documents_in(kuberay / "base/service/rayservice.yaml"), render(kuberay / "overlays/gpu/service")
    return {
        "serve.yaml": yaml.safe_load((ROOT / "cluster/serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(cpu["spec"]["serveConfigV2"]),
        "overlays/gpu": yaml.safe_load(gpu["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml", "overlays/gpu"])
def test_config_files_are_what_serve_and_the_builder_take(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve.schema import ServeDeploySchema

    document = serve_configs()[name]
    ServeDeploySchema.model_validate(document)
    [application] = document["applications"]
    monkeypatch.setenv("TC_RAY_API_KEY", "k")
    made = build({**application["args"], "runs": [str(run)]})
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert {one["name"] for one in application["deployments"]} == {made._bound_deployment.name}
