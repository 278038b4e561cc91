"""TensorBoard's event files, and trackers that are not installed. Weights & Biases is tried by hand (docs/tracking.md)."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tensorboardX.proto.event_pb2 import Event

from tc_ray.config.schema import RunConfig
from tc_ray.tracking.targets import TrackingError, Wandb, check_installed
from tc_ray.tracking.tracker import Tracker


def make_config(folder: Path, **tracking: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "trial", "folder": folder / "trial"}, "tracking": tracking})


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of all event files, in TensorFlow's record format: length, checksum, bytes, checksum."""
    for file in folder.glob("events.*"):
        data = file.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)


def run_part(config: RunConfig, rounds: range) -> dict[str, Any]:
    tracker = Tracker(config, config.run.path)
    for round in rounds:
        tracker.pilot(round, {"loss": 1.0 / round, "nothing": float("nan")})
        for step in (2 * round - 1, 2 * round):
            tracker.copilot(round, step, {"loss": 2.0})
    tracker.event("restart", "once")
    return dict(tracker.finish("done"))


def test_tensorboard_has_each_round_and_step_once_over_resumed_runs(tmp_path: Path) -> None:
    config = make_config(tmp_path, to=["tensorboard"])
    run_part(config, range(1, 4))
    status = run_part(config, range(2, 5))
    found = sorted(scalars(config.run.path / "tensorboard"))
    loss = [(step, value) for name, step, value in found if name == "pilot/loss"]
    assert loss == [(step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)]
    assert [step for name, step, _ in found if name == "copilot/loss"] == list(range(1, 9))
    assert [name for name, *_ in found if name.startswith("events")] == ["events/text_summary"] * 2
    assert not any("nothing" in name for name, *_ in found)
    assert status["mlflow"] is None and not (tmp_path / "mlflow.db").exists(), "MLflow was not asked for"


def test_every_kind_of_point_has_its_axis_in_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account is another's, so a module in its place takes down what is defined."""
    axes: dict[str, str] = {}
    run = SimpleNamespace(resumed=False, define_metric=lambda name, step_metric: axes.update({name: step_metric}))
    module = SimpleNamespace(init=lambda **_: run, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    Wandb(make_config(tmp_path), tmp_path, {})
    rounds = ("pilot", "validation", "error_ratio", "log", "evaluation", "time", "memory")
    assert axes == {"copilot/*": "copilot/step"} | {f"{kind}/*": f"{kind}/round" for kind in rounds}


def test_a_tracker_that_fails_is_one_event_and_the_run_goes_on(tmp_path: Path) -> None:
    config = make_config(tmp_path, to=["tensorboard"])
    config.run.path.mkdir()
    (config.run.path / "tensorboard").write_text("a file in its place")
    status = run_part(config, range(1, 3))
    assert status["state"] == "done"
    said = [event["text"] for event in status["events"] if event["kind"] == "tracking"]
    assert said[0].startswith("tensorboard fails, the run continues") and len(said) == 2


def test_a_package_that_is_not_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackingError, match=r"tracking\.to has wandb.*pip install wandb"):
        check_installed(make_config(tmp_path, to=["mlflow", "wandb"]))
    check_installed(make_config(tmp_path, to=["wandb"], enabled=False))
    check_installed(make_config(tmp_path))


def test_what_cannot_be_registered_is_refused() -> None:
    for tracking in ({"log_model": False}, {"to": ["tensorboard"]}):
        with pytest.raises(ValidationError, match=r"tracking\.register helper needs tracking\.log_model"):
            RunConfig.model_validate({"tracking": {"register": "helper", **tracking}})
    with pytest.raises(ValidationError, match="mlflow"):
        RunConfig.model_validate({"tracking": {"to": ["tensorflow"]}})
