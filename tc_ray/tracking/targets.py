"""Trackers beside MLflow, TensorBoard and Weights & Biases: are they installed, and how a point gets to each.

Invariant: both read metrics.jsonl, so a point is there once however often a run starts. They are opened in the thread of a
`follower.Follower`, and nobody waits for them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Protocol

from tc_ray.config.schema import RunConfig
from tc_ray.config.tracking import TRACKING_VARIABLE
from tc_ray.files import DamagedFileError, read_json, write_json
from tc_ray.tracking.mlflow_address import EXPERIMENT, sqlite_file
from tc_ray.tracking.points import Point

TENSORBOARD_FOLDER, WANDB_FILE = "tensorboard", "wandb.json"
_NEEDS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Module that writes to a tracker. TensorBoard itself is needed only where its files are looked at."""


class TrackingError(RuntimeError):
    """A tracker cannot be used with this configuration."""


class Target(Protocol):
    """An open tracker."""

    def add(self, number: int, point: Point) -> None:
        """Take the point of line `number` (from 1) of metrics.jsonl."""

    def close(self, complete: bool) -> None:
        """Put everything away. complete: the run has done all it was to do."""


def check_installed(config: RunConfig) -> None:
    """Raise TrackingError that says what to install, if a tracker that the config names is not installed."""
    for name, module in _NEEDS.items():
        if name in config.tracking.targets and importlib.util.find_spec(module) is None:
            raise TrackingError(
                f"tracking.to has {name}, and its Python package {module} is not installed: pip install {module}, on every node "
                f"of a cluster; or take {name} out of tracking.to"
            )


def check_one_node(uri: str, nodes: int) -> None:
    """Raise TrackingError that names the database file if processes on several nodes would write to it."""
    file = sqlite_file(uri)
    if file is not None and nodes > 1:
        raise TrackingError(
            f"MLflow's database {file} would be written from {nodes} nodes at once, which SQLite's locks do not survive on shared "
            f"storage: set tracking.uri or {TRACKING_VARIABLE} to a server (`mlflow server`), or take mlflow out of tracking.to"
        )


def open_target(name: str, config: RunConfig, folder: Path, params: dict[str, str]) -> Target:
    """Open the tracker `name`, of `tracking.to`, for the run in `folder`. params: its config as dotted keys."""
    return Tensorboard(folder) if name == "tensorboard" else Wandb(config, folder, params)


def axis_of(point: Point) -> tuple[str, int]:
    """What the metrics of a point stand over: the Copilot's own step, else the Pilot's round."""
    return ("step", point["step"]) if "step" in point else ("round", point.get("round", 0))


class Tensorboard:
    """Event files in tensorboard/ of the run folder. Each start writes them anew from metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder / TENSORBOARD_FOLDER, ignore_errors=True)
        self._writer = SummaryWriter(logdir=str(folder / TENSORBOARD_FOLDER), flush_secs=5)

    def add(self, number: int, point: Point) -> None:
        if point["kind"] == "event":
            text = f"{point['event']}: {point['text']}"
            self._writer.add_text("events", text, point.get("round", 0), walltime=point["time"])
        for name, value in point.get("metrics", {}).items():
            if value is not None:
                self._writer.add_scalar(f"{point['kind']}/{name}", value, axis_of(point)[1], walltime=point["time"])

    def close(self, complete: bool) -> None:
        self._writer.close()


class Wandb:
    """One run of Weights & Biases: a line of metrics.jsonl is a step of it, the axis of each kind a metric of its own."""

    def __init__(self, config: RunConfig, folder: Path, params: dict[str, str]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=config.tracking.experiment or os.environ.get("WANDB_PROJECT") or EXPERIMENT,
            name=config.run.name,
            id=_wandb_id(folder),
            resume="allow",
            dir=str(folder),
            config=params,
            settings=wandb.Settings(silent=True, console="off"),
        )
        for kind in ("pilot", "copilot", "validation", "error_ratio", "log", "evaluation", "time", "memory"):
            axis = f"{kind}/{'step' if kind == 'copilot' else 'round'}"
            self._run.define_metric(f"{kind}/*", step_metric=axis)
        self._has = self._run.step if self._run.resumed else 0

    def add(self, number: int, point: Point) -> None:
        kind, (axis, place) = point["kind"], axis_of(point)
        values = {f"{kind}/{name}": value for name, value in point.get("metrics", {}).items() if value is not None}
        if values and number >= self._has:
            self._run.log({**values, f"{kind}/{axis}": place}, step=number)

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


def _wandb_id(folder: Path) -> str:
    """The run's id there, which the run folder keeps; a torn file gives a new one, with all points."""
    try:
        return str(read_json(folder / WANDB_FILE)["id"])
    except (FileNotFoundError, DamagedFileError, KeyError):
        made = uuid.uuid4().hex
        write_json(folder / WANDB_FILE, {"id": made})
        return made
