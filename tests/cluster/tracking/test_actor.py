"""The Tracker as an actor: one writer, killed and restarted without doubled points, and a wrong store told at once."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tc_ray.config.schema import RunConfig
from tc_ray.tracking.mlflow_address import resolve_uri
from tc_ray.tracking.points import read_points
from tc_ray.tracking.targets import TrackingError
from tc_ray.tracking.tracker import start_tracker
from tests.support.secret_run import mlflow_server


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    yield
    ray.shutdown()


def make_config(folder: Path, **sections: object) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "trial", "folder": folder / "trial"}, **sections})


def test_killed_tracker_comes_back_over_torn_files_and_goes_on(tmp_path: Path) -> None:
    """Fault 7: a truncated status.json ended the constructor of the restarted actor, and so the run."""
    from mlflow import MlflowClient

    config = make_config(tmp_path)
    tracker = start_tracker(config, config.run.path)
    for round in (1, 2, 3):
        tracker.pilot.remote(round, {"loss": 1.0 / round})
    run_id = ray.get(tracker.status.remote())["mlflow"]["run_id"]
    status_file = config.run.path / "status.json"
    status_file.write_bytes(status_file.read_bytes()[:100])
    with (config.run.path / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b"\0" * 64 + b"\n")
    ray.kill(tracker, no_restart=False)
    # waited for: calls that Ray sends again after the restart may come behind later ones
    ray.get([tracker.pilot.remote(round, {"loss": 1.0 / round}) for round in (3, 4)], timeout=60)
    status = ray.get(tracker.finish.remote("done"), timeout=60)
    assert status["mlflow"]["run_id"] == run_id
    assert any("metrics.jsonl: 1 damaged lines" in event["text"] for event in status["events"])
    points = [p for p in read_points(config.run.path / "metrics.jsonl") if p["kind"] == "pilot"]
    assert [p["round"] for p in points] == [1, 2, 3, 4]
    history = MlflowClient(tracking_uri=resolve_uri(config)).get_metric_history(run_id, "pilot/loss")
    assert [p.step for p in history] == [1, 2, 3, 4]
    ray.kill(tracker)


def test_wrong_store_is_a_clear_error_of_the_caller(tmp_path: Path) -> None:
    config = make_config(tmp_path, tracking={"uri": "nonsense://x"})
    with pytest.raises(TrackingError, match="nonsense://x"):
        start_tracker(config, config.run.path)


def test_address_user_and_password_of_the_environment_reach_the_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray was started without these variables, as a cluster is that a run joins: its workers do not have them."""
    from mlflow import MlflowClient

    password = "Tr0ub4dor-actor"
    known = base64.b64encode(f"somebody:{password}".encode()).decode()
    with mlflow_server(tmp_path, authorization=f"Basic {known}") as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
        config = make_config(tmp_path)
        with pytest.raises(TrackingError, match=r"401.*Give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            start_tracker(config, config.run.path)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        tracker = start_tracker(config, config.run.path)
        tracker.pilot.remote(1, {"loss": 1.0})
        tracker.event.remote("note", f"refused with {password}")
        status = ray.get(tracker.finish.remote("done"), timeout=60)
        ray.kill(tracker)
        client = MlflowClient(tracking_uri=resolve_uri(config))
        run = client.get_run(status["mlflow"]["run_id"])
        assert client.get_experiment(run.info.experiment_id).name == "theirs"
        assert [p.step for p in client.get_metric_history(run.info.run_id, "pilot/loss")] == [1]
    assert status["mlflow"]["errors"] == 0
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    for file in (path for folder in (tmp_path, logs) for path in folder.rglob("*") if path.is_file()):
        assert password.encode() not in file.read_bytes(), file
