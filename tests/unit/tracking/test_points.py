"""metrics.jsonl and status.json: no doubled points, no torn reads."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.tracking.points import PointFile, read_points
from tc_ray.tracking.statusfile import read_status
from tc_ray.tracking.tracker import Tracker


def pilot_point(round: int, **metrics: float) -> dict[str, object]:
    return {"time": 1000.0 + round, "round": round, "metrics": metrics}


def test_replayed_rounds_are_dropped_also_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = PointFile(path)
    for round in (1, 2, 3, 2, 3):
        first.append("pilot", pilot_point(round, loss=round), axis=round)
    second = PointFile(path)
    assert second.started == 1001.0
    for round in (2, 3, 4):
        second.append("pilot", pilot_point(round, loss=-round), axis=round)
    assert [(p["round"], p["metrics"]["loss"]) for p in read_points(path)] == [(1, 1), (2, 2), (3, 3), (4, -4)]


def test_dedup_is_per_metric_and_per_kind(tmp_path: Path) -> None:
    points = PointFile(tmp_path / "metrics.jsonl")
    points.append("pilot", pilot_point(5, loss=1.0), axis=5)
    points.append("pilot", pilot_point(5, loss=1.0, grad_norm=2.0), axis=5)
    points.append("copilot", {**pilot_point(3, loss=9.0), "step": 1}, axis=1)
    written = [point["metrics"] for point in read_points(points.path)]
    assert written == [{"loss": 1.0}, {"grad_norm": 2.0}, {"loss": 9.0}]


def test_copilot_axis_is_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    points = PointFile(path)
    for step in (1, 2, 3):
        points.append("copilot", {**pilot_point(7, rmse=0.5), "step": step}, axis=step)
    again = PointFile(path)
    for step in (3, 4):
        again.append("copilot", {**pilot_point(8, rmse=0.4), "step": step}, axis=step)
    assert [point["step"] for point in read_points(path)] == [1, 2, 3, 4]


def test_cut_off_last_line_is_removed_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    points = PointFile(path)
    points.append("pilot", pilot_point(1, loss=1.0), axis=1)
    with path.open("a") as file:
        file.write('{"kind": "pilot", "time": 10')
    assert len(list(read_points(path))) == 1
    again = PointFile(path)
    again.append("pilot", pilot_point(2, loss=2.0), axis=2)
    assert [p["round"] for p in read_points(path)] == [1, 2]


def test_a_damaged_line_is_passed_over_and_named(tmp_path: Path) -> None:
    """Fault 7: one torn line of metrics.jsonl ended every later start of the run."""
    path = tmp_path / "metrics.jsonl"
    damaged = ["nonsense", "", "null", "[]", "{}", "\0" * 9, '{"kind": "pilot", "time": 1}', "[" * 99_999]
    good = [json.dumps({"kind": "pilot", **pilot_point(round, loss=1.0)}) for round in (1, 2)]
    path.write_text("\n".join([good[0], *damaged, good[1], ""]))
    assert [p["round"] for p in read_points(path)] == [1, 2]
    again = PointFile(path)
    assert again.damage == f"{len(damaged)} damaged lines were skipped, the first is line 2"
    again.append("pilot", pilot_point(3, loss=2.0), axis=3)
    assert [p["round"] for p in read_points(path)] == [1, 2, 3]


def test_the_status_is_written_while_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader takes an old file for a dead run, and the last change lands too."""
    monkeypatch.setattr("tc_ray.tracking.tracker.STATUS_SECONDS", 0.02)
    config = RunConfig.model_validate({"run": {"folder": tmp_path}, "tracking": {"enabled": False}})
    tracker = Tracker(config, tmp_path)
    first = read_status(tmp_path)["updated"]
    tracker.pilot(1, {"loss": 1.0})
    deadline = time.monotonic() + 5
    while not read_status(tmp_path)["pilot"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_status(tmp_path)["pilot"]["round"] == 1 and read_status(tmp_path)["updated"] > first
    tracker.finish("stopped")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_status_of_no_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run has started"):
        read_status(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_status(tmp_path / "absent")


def test_a_loss_that_is_not_a_number_reaches_status_and_file(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"run": {"folder": tmp_path}, "tracking": {"enabled": False}})
    tracker = Tracker(config, tmp_path)
    tracker.pilot(1, {"loss": float("nan"), "tokens": 8})
    assert tracker.status()["pilot"]["metrics"] == {"loss": None, "tokens": 8.0}
    (point,) = (point for point in read_points(tmp_path / "metrics.jsonl") if point["kind"] == "pilot")
    assert point["metrics"] == {"loss": None, "tokens": 8.0}
    with pytest.raises(ValueError, match="low"):
        tracker.pilot(2, {"loss": "low"})
