"""Where MLflow is and as whom: folder names with any character, and what the user's `MLFLOW_*` variables decide."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tc_ray.config.redact import redact
from tc_ray.config.schema import RunConfig
from tc_ray.tracking.mlflow_address import (
    mlflow_command,
    refused_soon,
    resolve_uri,
    sqlite_file,
    sqlite_uri,
    take_variables,
    tracker_variables,
)
from tc_ray.tracking.mlflow_writer import open_run
from tc_ray.tracking.targets import TrackingError, check_one_node
from tc_ray.tracking.tracker import Tracker
from tests.support.mlflow_store import new_store


def make_config(folder: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "trial", "folder": folder / "trial"}, **sections})


@pytest.mark.parametrize("name", ["50% of?1#2", "100%25", "a b:c@d"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    """`%` and `?` took 101 s and ended in "unable to open database file"."""
    folder = tmp_path / name
    folder.mkdir()
    new_store(folder)
    config = make_config(folder)
    tracker = Tracker(config, config.run.path, mlflow=open_run(config, config.run.path))
    tracker.pilot(1, {"loss": 1.0})
    tracker.evaluation({"lam": 0.5}, "| a |")
    assert tracker.finish("done")["mlflow"]["errors"] == 0
    client = MlflowClient(tracking_uri=resolve_uri(config))
    run_id = json.loads((config.run.path / "mlflow.json").read_text())["run_id"]
    assert [p.value for p in client.get_metric_history(run_id, "pilot/loss")] == [1.0]
    assert list(folder.glob(f"mlartifacts/{run_id}/artifacts/evaluation.md"))
    assert [path.name for path in tmp_path.iterdir()] == [name], "no other folder was made"
    assert open_run(config, config.run.path).run_id == run_id, "a resume finds the run again"


def test_plain_paths_give_plain_addresses(tmp_path: Path) -> None:
    assert sqlite_uri(tmp_path / "mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert sqlite_file(sqlite_uri(tmp_path / "50% ?" / "x.db")) == tmp_path / "50% ?" / "x.db"
    assert sqlite_file("sqlite:///x.db?timeout=3") == Path("x.db")
    assert sqlite_file("http://somewhere:5000") is None and sqlite_file("sqlite:///:memory:") is None
    assert mlflow_command(f"sqlite:///{tmp_path}/a b/mlflow.db").endswith("/a b/mlflow.db'"), "for a shell"


def test_the_experiment_is_the_configs_then_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(tmp_path)

    def experiment(folder: str, **tracking: Any) -> str:
        config = make_config(tmp_path, tracking=tracking)
        client = MlflowClient(tracking_uri=resolve_uri(config))
        run_id = open_run(config, tmp_path / folder).run_id
        return str(client.get_experiment(client.get_run(run_id).info.experiment_id).name)

    assert experiment("a") == "tc-ray"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    assert experiment("b") == "Default"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    assert experiment("c") == "theirs"
    assert experiment("d", experiment="ours") == "ours"


def test_a_deleted_experiment_is_a_clear_error(tmp_path: Path) -> None:
    new_store(tmp_path)
    config = make_config(tmp_path, tracking={"experiment": "gone"})
    client = MlflowClient(tracking_uri=resolve_uri(config))
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match=r"'gone' .* is deleted.*tracking\.experiment"):
        open_run(config, config.run.path)


def test_variables_reach_another_process_and_their_secrets_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MLFLOW_TRACKING_USERNAME": "somebody-known",
        "MLFLOW_TRACKING_PASSWORD": "Tr0ub4dor-envpw",
        "MLFLOW_TRACKING_TOKEN": "Tr0ub4dor-envtk",
        "MLFLOW_TRACKING_URI": "http://me:Tr0ub4dor-envur@127.0.0.1:5000",
        "OTHER_PASSWORD": "Tr0ub4dor-other",
    }.items():
        monkeypatch.setenv(name, value)
    taken = tracker_variables()
    assert set(taken) == {f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN", "URI")}
    said = redact("401 for somebody-known Tr0ub4dor-envpw Tr0ub4dor-envtk Tr0ub4dor-envur")
    assert said == "401 for somebody-known *** *** ***"
    for name in taken:
        monkeypatch.delenv(name)
    take_variables(taken | {"MLFLOW_TRACKING_PASSWORD": "Tr0ub4dor-second"})
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == "Tr0ub4dor-envtk"
    assert redact("Tr0ub4dor-second") == "***"
    for name in taken:  # set by `take_variables`, not by the test's own means
        os.environ.pop(name)


def test_short_waits_hold_for_their_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left in the environment, they would bound uploads too, and be taken for the user's own."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with refused_soon():
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert tracker_variables() == {"MLFLOW_HTTP_REQUEST_TIMEOUT": "77"}


def test_a_database_file_is_written_from_one_node(tmp_path: Path) -> None:
    """Of a run the Tracker alone writes; the cells of a study write from every node."""
    file = tmp_path / "mlflow.db"
    check_one_node(sqlite_uri(file), nodes=1)
    check_one_node("http://127.0.0.1:5000", nodes=8)
    with pytest.raises(TrackingError, match=r"mlflow\.db would be written from 2 nodes.*mlflow server"):
        check_one_node(sqlite_uri(file), nodes=2)
