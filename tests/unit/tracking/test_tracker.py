"""The Tracker against a real MLflow in sqlite, without Ray: resumed runs, replays, errors, the picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from tc_ray.config.schema import RunConfig
from tc_ray.tracking.datasets import UsedRows
from tc_ray.tracking.mlflow_address import resolve_uri
from tc_ray.tracking.mlflow_writer import MlflowRun, MlflowWriter, flat_params, open_run
from tc_ray.tracking.points import EVENTS_SHOWN, PointFile
from tc_ray.tracking.targets import TrackingError
from tc_ray.tracking.tracker import Tracker
from tests.support.mlflow_store import new_store


def make_config(folder: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "trial", "folder": folder / "trial"}, **sections})


def start(config: RunConfig) -> Tracker:
    mlflow = open_run(config, config.run.path) if config.tracking.enabled else None
    return Tracker(config, config.run.path, {"rounds_total": 6, "copilot_steps_total": 9}, mlflow)


def run_part(config: RunConfig, rounds: range, steps: range) -> Tracker:
    tracker = start(config)
    tracker.phase("train")
    for round in rounds:
        tracker.pilot(round, {"loss": 3.0 / round, "tokens": 100})
        tracker.log({"bytes": 1000 * round, "rows": 16 * round, "lag_rounds": 2})
    for step in steps:
        tracker.copilot((step + 2) // 3, step, {"loss": 1.0 / step})
    return tracker


def history(config: RunConfig, key: str) -> list[tuple[int, float]]:
    run_id = json.loads((config.run.path / "mlflow.json").read_text())["run_id"]
    points = MlflowClient(tracking_uri=resolve_uri(config)).get_metric_history(run_id, key)
    return [(p.step, p.value) for p in sorted(points, key=lambda p: (p.timestamp, p.step))]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A run that was cut off after round 4, goes on from its checkpoint of round 2, and ends."""
    config = make_config(tmp_path_factory.mktemp("resumed"))
    killed = run_part(config, range(1, 5), range(1, 6))
    assert killed._mlflow is not None
    killed._mlflow._end.set()  # its thread ends, like a killed process: no finish, no terminated run
    killed._mlflow._thread.join()
    killed._ended.set()  # nor does it write the status any more
    first_id = (config.run.path / "mlflow.json").read_text()
    config = make_config(config.run.path.parent, pilot={"learning_rate": 9e-4})
    tracker = run_part(config, range(3, 7), range(4, 10))
    tracker.event("restart", "the Pilot's workers were restarted from round 2")
    tracker.evaluation({"pilot": {"Hit@10": 0.5}, "fused": {"accuracy": 0.625}, "lam": 0.5}, "| a | b |")
    status = tracker.finish("done")
    assert (config.run.path / "mlflow.json").read_text() == first_id
    return config, status


def test_both_models_have_each_round_and_step_once(resumed: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = resumed
    assert history(config, "pilot/loss") == [(r, pytest.approx(3.0 / r)) for r in range(1, 7)]
    assert history(config, "copilot/loss") == [(s, pytest.approx(1.0 / s)) for s in range(1, 10)], "by its own step"
    assert [round for _, round in history(config, "copilot/round")] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    lines = [json.loads(text) for text in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    assert [p["round"] for p in lines if p["kind"] == "pilot"] == [1, 2, 3, 4, 5, 6]
    assert [p["kind"] for p in lines].count("start") == 2


def test_rows_are_dataset_inputs_with_their_hash_and_source(tmp_path: Path) -> None:
    """Once, however often the run starts; other rows under the same name are another dataset."""
    new_store(tmp_path)
    config = make_config(tmp_path)
    used = [
        UsedRows("training", "aaaa", str(tmp_path / "50% own?.jsonl"), 80),
        UsedRows("validation", "bbbb", "s3://somebody:Tr0ub4dor-rows@bucket/rows.parquet", 12),
        UsedRows("testing", "cccc", "embedded: chain sums", 7),
    ]
    for _ in range(2):
        mlflow = open_run(config, config.run.path)
        Tracker(config, config.run.path, mlflow=mlflow, used=used).finish("done")
    inputs = MlflowClient(tracking_uri=mlflow.uri).get_run(mlflow.run_id).inputs.dataset_inputs
    found = {made.tags[0].value: made.dataset for made in inputs}
    assert len(inputs) == 3 and {context: found[context].digest for context in found} == {
        "training": "aaaa",
        "validation": "bbbb",
        "testing": "cccc",
    }
    assert json.loads(found["training"].source) == {"uri": str(tmp_path / "50% own?.jsonl")}
    assert json.loads(found["validation"].source) == {"uri": "s3://***@bucket/rows.parquet"}
    assert json.loads(found["testing"].source)["tags"] == {"tc_ray.source": "embedded: chain sums"}
    assert json.loads(found["training"].profile) == {"num_rows": 80}


def test_changed_param_does_not_stop_a_resumed_run(resumed: tuple[RunConfig, dict[str, Any]]) -> None:
    config, status = resumed
    run = MlflowClient(tracking_uri=resolve_uri(config)).get_run(status["mlflow"]["run_id"])
    assert run.data.params["pilot.learning_rate"] == "0.0003"
    assert run.data.tags["changed.pilot.learning_rate"] == "0.0009"
    assert run.info.status == "FINISHED"


def test_evaluation_and_picture_are_in_mlflow(resumed: tuple[RunConfig, dict[str, Any]]) -> None:
    config, status = resumed
    assert history(config, "evaluation/fused.accuracy") == [(6, 0.625)]
    assert history(config, "evaluation/pilot.Hit_10") == [(6, 0.5)], "MLflow allows no @"
    client = MlflowClient(tracking_uri=resolve_uri(config))
    names = {a.path for a in client.list_artifacts(status["mlflow"]["run_id"])}
    assert names == {"evaluation.md", "losses.png"}
    assert (config.run.path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_last_status(resumed: tuple[RunConfig, dict[str, Any]]) -> None:
    config, status = resumed
    written = json.loads((config.run.path / "status.json").read_text())
    written.pop("updated"), status.pop("updated")
    assert written == status
    assert (status["state"], status["phase"], status["restarts"]) == ("done", "done", 1)
    assert (status["pilot"]["round"], status["copilot"]["step"]) == (6, 9)
    assert status["mlflow"]["errors"] == 0
    assert status["evaluation"]["lam"] == 0.5


def test_points_that_never_reached_mlflow_are_filled_in(tmp_path: Path) -> None:
    config = make_config(tmp_path, tracking={"enabled": False})
    run_part(config, range(1, 4), range(1, 4)).finish("stopped")
    config = make_config(tmp_path)
    new_store(tmp_path)
    run_part(config, range(3, 5), range(3, 5)).finish("done")
    assert [step for step, _ in history(config, "pilot/loss")] == [1, 2, 3, 4]
    assert len(history(config, "copilot/loss")) == 4


def test_mlflow_error_is_told_and_does_not_reach_the_run(tmp_path: Path) -> None:
    new_store(tmp_path)
    config = make_config(tmp_path)
    tracker = start(config)
    MlflowClient(tracking_uri=resolve_uri(config)).delete_run(tracker.status()["mlflow"]["run_id"])
    tracker.pilot(1, {"loss": 1.0})
    status = tracker.finish("done")
    assert status["mlflow"]["errors"] > 0
    assert any("MLflow fails" in e["text"] for e in status["events"])
    assert status["state"] == "done"


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:////proc/none/mlflow.db", "http://127.0.0.1:9"])
def test_wrong_uri_is_a_clear_error_at_once(tmp_path: Path, uri: str) -> None:
    config = make_config(tmp_path, tracking={"uri": uri})
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"tracking\.uri") as error:
        open_run(config, config.run.path)
    assert uri in str(error.value)
    assert time.monotonic() - began < 60


def test_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_uri(make_config(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert resolve_uri(make_config(tmp_path)) == "http://somewhere:5000"
    assert resolve_uri(make_config(tmp_path, tracking={"uri": "sqlite:///x.db"})) == "sqlite:///x.db"


def test_calls_do_not_wait_for_mlflow(tmp_path: Path) -> None:
    new_store(tmp_path)
    config = make_config(tmp_path)
    tracker = start(config)
    began = time.monotonic()
    for round in range(1, 501):
        tracker.pilot(round, {"loss": 1.0, "learning_rate": 0.1})
    assert time.monotonic() - began < 2.0
    tracker.finish("done")
    assert len(history(config, "pilot/learning_rate")) == 500


def test_long_params_are_cut_and_all_fields_are_there(tmp_path: Path) -> None:
    params = flat_params(make_config(tmp_path, data={"system": "x" * 900}))
    assert len(params["data.system"]) == 500
    assert params["pilot.lora.rank"] == "16" and params["fusion.lam_grid"].startswith("[0.0")


def test_eta_waits_for_the_slower_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tc_ray.tracking.tracker.time.time", lambda: now[0])
    plan = {"rounds_total": 10, "copilot_steps_total": 100}
    tracker = Tracker(make_config(tmp_path, tracking={"enabled": False}), tmp_path, plan)
    tracker.phase("train")
    assert tracker.status()["eta_seconds"] is None
    for round in range(1, 6):
        now[0] += 2.0
        tracker.pilot(round, {"loss": 1.0, "tokens": 50})
        tracker.copilot(round, 2 * round, {"loss": 1.0})
    status = tracker.status()
    assert status["eta_seconds"] == pytest.approx(90.0)  # 90 Copilot steps at 1 a second; 5 rounds would take 10 s
    assert status["tokens_per_second"] == pytest.approx(25.0)
    assert status["rounds_per_minute"] == pytest.approx(30.0)
    now[0] += 100.0
    tracker.pilot(3, {"loss": 1.0, "tokens": 50})
    now[0] += 2.0
    tracker.pilot(4, {"loss": 1.0, "tokens": 50})
    assert tracker.status()["rounds_per_minute"] == pytest.approx(30.0), "a replay starts anew"


def test_an_outage_of_mlflow_is_one_event_and_restarts_stay_in_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 15: with MLflow's database removed in mid-run, 75 events pushed the restarts out of view."""
    monkeypatch.setattr("tc_ray.tracking.mlflow_writer.SEND_SECONDS", 0.01)
    new_store(tmp_path)
    config = make_config(tmp_path)
    tracker = start(config)
    tracker.event("restart", "Pilot attempt 2 goes on after round 5")
    (tmp_path / "mlflow.db").unlink()
    assert tracker._mlflow is not None
    tracker.pilot(1, {"loss": 1.0})
    while tracker._mlflow.errors < 10:
        time.sleep(0.01)
    status = tracker.finish("done")
    told = [event["text"] for event in status["events"] if "MLflow" in event["text"]]
    assert len(told) == 2 and told[0].startswith("MLflow fails") and told[1].startswith("not everything reached MLflow")
    assert status["events"][0]["kind"] == "restart"


def test_points_of_an_outage_reach_mlflow_once_when_it_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a batch was written and the answer lost."""
    monkeypatch.setattr("tc_ray.tracking.mlflow_writer.SEND_SECONDS", 0.01)
    stored: list[tuple[str, int, int]] = []
    calls = []

    class Client:
        def __init__(self, tracking_uri: str) -> None: ...

        def log_batch(self, _: str, metrics: list[Any]) -> None:
            calls.append(len(metrics))
            stored.extend((m.key, m.step, m.timestamp) for m in metrics)
            if len(calls) < 3:
                raise OSError("the answer is lost")

        def get_metric_history(self, _: str, key: str) -> list[Any]:
            return [SimpleNamespace(step=step, timestamp=time) for name, step, time in stored if name == key]

        def set_terminated(self, *_: object) -> None: ...

    monkeypatch.setattr("tc_ray.tracking.mlflow_writer.MlflowClient", Client)
    points = PointFile(tmp_path / "metrics.jsonl")
    writer = MlflowWriter(MlflowRun("uri", "run"), points.path, lambda _: None)
    for round in range(1, 500):
        points.append("pilot", {"time": 1000.0 + round, "round": round, "metrics": {"loss": 1.0}}, axis=round)
    while writer.errors < 2:
        time.sleep(0.01)
    assert writer.finish("FINISHED", 10) and writer.errors == 2
    assert [step for _, step, _ in stored] == list(range(1, 500))


def test_repeated_events_are_counted_and_restarts_are_never_pushed_out(tmp_path: Path) -> None:
    """Fault 15, the kind: whatever repeats, and however much else happens; over resumed runs."""
    points = PointFile(tmp_path / "metrics.jsonl")

    def add(kind: str, text: str) -> None:
        points.append("event", {"time": 1.0, "round": 0, "event": kind, "text": text})

    add("restart", "first")
    for number in range(100):
        add("evaluate", f"lambda {number}")
        add("mlflow", "down")
    add("restart", "first")
    add("mlflow", "down")
    for shown in (points, PointFile(points.path)):
        assert len(shown.events) == EVENTS_SHOWN and shown.restarts == 2
        assert [event["text"] for event in shown.events if event["kind"] == "restart"] == ["first", "first"]
        assert max(event["count"] for event in shown.events if event["text"] == "down") > 1


def test_a_tracker_restarted_during_an_outage_goes_on(tmp_path: Path) -> None:
    """Fault 15, another door: the actor's constructor opened MLflow again, and an error there ended the run."""
    new_store(tmp_path)
    config = make_config(tmp_path)
    mlflow = open_run(config, config.run.path)
    (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
    (tmp_path / "mlflow.db").mkdir()
    tracker = Tracker(config, config.run.path, mlflow=mlflow)
    tracker.pilot(1, {"loss": 1.0})
    while not tracker.status()["mlflow"]["errors"]:
        time.sleep(0.05)
    (tmp_path / "mlflow.db").rmdir()
    (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
    assert tracker.finish("done")["state"] == "done"
    assert [step for step, _ in history(config, "pilot/loss")] == [1]
