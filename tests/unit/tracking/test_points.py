"""metrics.jsonl and status.json: no doubled points, no torn reads."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.files import read_json
from tc_ray.tracking.points import PointFile, read_points
from tc_ray.tracking.statusfile import StatusFile, read_status
from tc_ray.tracking.tracker import Tracker


def pilot_point(round: int, **metrics: float) -> dict[str, object]:
    return {"time": 1000.0 + round, "round": round, "metrics": metrics}


def test_replayed_rounds_are_dropped_also_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = PointFile(path)
    for round in (1, 2, 3, 2, 3):
        first.append("pilot", pilot_point(round, loss=round), axis=round)
    first.close()
    second = PointFile(path)
    assert second.is_resumed
    for round in (2, 3, 4):
        second.append("pilot", pilot_point(round, loss=-round), axis=round)
    assert [(p["round"], p["metrics"]["loss"]) for p in read_points(path)] == [(1, 1), (2, 2), (3, 3), (4, -4)]


def test_dedup_is_per_metric_and_per_kind(tmp_path: Path) -> None:
    points = PointFile(tmp_path / "metrics.jsonl")
    points.append("pilot", pilot_point(5, loss=1.0), axis=5)
    late = points.append("pilot", pilot_point(5, loss=1.0, grad_norm=2.0), axis=5)
    assert late is not None and late["metrics"] == {"grad_norm": 2.0}
    copilot = points.append("copilot", {**pilot_point(3, loss=9.0), "step": 1}, axis=1)
    assert copilot is not None and copilot["metrics"] == {"loss": 9.0}


def test_copilot_axis_is_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    points = PointFile(path)
    for step in (1, 2, 3):
        points.append("copilot", {**pilot_point(7, rmse=0.5), "step": step}, axis=step)
    points.close()
    again = PointFile(path)
    assert again.append("copilot", {**pilot_point(8, rmse=0.4), "step": 3}, axis=3) is None
    assert again.append("copilot", {**pilot_point(8, rmse=0.4), "step": 4}, axis=4) is not None


def test_cut_off_last_line_is_removed_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    points = PointFile(path)
    points.append("pilot", pilot_point(1, loss=1.0), axis=1)
    points.close()
    with path.open("a") as file:
        file.write('{"kind": "pilot", "time": 10')
    assert len(list(read_points(path))) == 1
    again = PointFile(path)
    again.append("pilot", pilot_point(2, loss=2.0), axis=2)
    assert [p["round"] for p in read_points(path)] == [1, 2]


def test_a_damaged_line_is_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault 7: one torn line of metrics.jsonl ended every later start of the run."""
    path = tmp_path / "metrics.jsonl"
    damaged = ["nonsense", "", "null", "[]", "{}", "\0" * 9, '{"kind": "pilot", "time": 1}', "[" * 99_999]
    damaged += [
        '{"kind": "pilot", "time": "1", "metrics": {}}',
        '{"kind": "pilot", "time": 1, "metrics": {"loss": "x"}}',
    ]
    good = [json.dumps({"kind": "pilot", **pilot_point(round, loss=1.0)}) for round in (1, 2)]
    path.write_text("\n".join([good[0], *damaged, good[1], ""]))
    assert [p["round"] for p in read_points(path)] == [1, 2]
    assert f"metrics.jsonl: {len(damaged)} damaged lines were skipped, the first is line 2" in caplog.text
    again = PointFile(path)
    assert again.damage.startswith(f"{len(damaged)} damaged lines")
    again.append("pilot", pilot_point(3, loss=2.0), axis=3)
    assert [p["round"] for p in read_points(path)] == [1, 2, 3]


def test_nan_becomes_null_and_a_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    points = PointFile(path)
    points.append("pilot", pilot_point(1, loss=float("nan")), axis=1)
    assert json.loads(path.read_text())["metrics"] == {"loss": None}
    with pytest.raises(TypeError, match="'loss'"):
        points.append("pilot", {"time": 1.0, "round": 2, "metrics": {"loss": "low"}}, axis=2)


def test_status_file_is_throttled_and_the_last_change_lands(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, object]:
        made.append(state["n"])
        return dict(state)

    state = {"n": 0}
    status = StatusFile(tmp_path, make, interval_s=0.3)
    status.write()
    for n in range(200):
        state["n"] = n
        status.touch()
    assert len(made) <= 2
    deadline = time.monotonic() + 5
    while read_json(tmp_path / "status.json")["n"] != 199 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_json(tmp_path / "status.json") == {"n": 199}
    assert len(made) <= 3, "one of the start, one of the first change, one of all others"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


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
