"""The Tracker: the one place where a run's metrics meet, and the one writer of its metrics, status and MLflow.

Invariant: a (metric, round) or (Copilot metric, step) is written once, over worker crashes and resumed runs. Nothing here
waits for MLflow before `finish`, and after the start no MLflow error reaches the run. The job starts it as an actor
(`start_tracker`); Pilot, Copilot and Ledger call it without waiting for an answer. Every measurement passes through
`Tracker._record`. The progress view and the plot know pilot `loss`, `tokens` (of the round); copilot `loss`; log `bytes`,
`lag_rounds`. Any other metric is written too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_ray.config.redact import redact, redact_address, remember
from tc_ray.config.schema import RunConfig
from tc_ray.files import DamagedFileError, finite
from tc_ray.text import first_line
from tc_ray.tracking.mlflow_writer import (
    RUN_ID_FILE,
    MlflowWriter,
    TrackingError,
    mlflow_command,
    open_run,
    resolve_uri,
)
from tc_ray.tracking.plot import LOSSES_FILE, draw_losses
from tc_ray.tracking.points import METRICS_FILE, PointFile, plain_numbers
from tc_ray.tracking.progress import waiting_text
from tc_ray.tracking.statusfile import STATUS_FILE, Status, StatusFile, add_event, read_status

PHASES = ("prepare", "train", "catch-up", "evaluate", "export", "done", "failed")
ENDS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""Ways a run ends -> MLflow's words for them."""
WAITING_TAG = "tc_ray.waiting"
"""MLflow tag: what the run waits for now, or empty."""
LOG_SECONDS = 5.0
"""A log point is written when the round has changed, or after this time (in the catch-up the round does not change)."""
RATE_WINDOW = 64
MLFLOW_SECONDS = 120.0
"""Longest wait for MLflow at the end."""


class Tracker:
    """Writes metrics.jsonl, status.json, MLflow and, at the end, losses.png.

    Args:
        config: the run's config.
        folder: run folder; the files of an earlier start are continued. Damaged ones stop nothing: an event says what is
            missing.
        uri: MLflow tracking URI; default by `resolve_uri` in this process.
        was_opened: the caller has opened MLflow. If it cannot be opened again (the actor was restarted while MLflow was away),
            the run continues without it.

    Raises:
        TrackingError: MLflow is enabled and cannot be used, or a folder stands where a file should be.
    """

    def __init__(self, config: RunConfig, folder: Path, uri: str | None = None, *, was_opened: bool = False) -> None:
        self._lock = threading.RLock()
        remember(config.secrets())  # in this process too: an event's text may hold any of them
        self._folder = folder
        check_places(folder)
        self._points = PointFile(folder / METRICS_FILE)
        before, damage = _status_before(folder) if self._points.is_resumed else ({}, "")
        self._status: Status = {
            "run": config.run.name,
            "folder": str(folder),
            "state": "running",
            "phase": "prepare",
            "started": before.get("started") or time.time(),
            "plan": before.get("plan", {}),
            "waiting": {},
            **{kind: self._points.latest(kind) for kind in ("pilot", "copilot", "log")},
            "events": before.get("events", []),
            "processes": {},
            "evaluation": before.get("evaluation", {}),
        }
        self._latest_time = 0.0
        self._log_written: tuple[int, float] = (-1, float("-inf"))
        self._pilot_rate, self._copilot_rate, self._token_rate = Rate(), Rate(), Rate()
        self._tokens = 0.0
        self._gauges: dict[str, Any] = {}
        self._status_file = StatusFile(folder, self.status)
        self._mlflow: MlflowWriter | None = None
        if config.tracking.enabled:
            uri = uri or resolve_uri(config)
            try:
                run_id = open_run(config, folder, uri)
                self._mlflow = MlflowWriter(run_id, uri, folder / METRICS_FILE, self._mlflow_failed)
            except TrackingError as error:
                if not was_opened:
                    raise
                lost = f"{first_line(error)}. The run continues without it; its next start sends the missing points"
                self.event("mlflow", lost)
        self._points.append("start", {"time": self._now(), "round": self._round})
        for text in filter(None, (self._points.damage and f"{METRICS_FILE}: {self._points.damage}", damage)):
            self.event("tracking", text)
        self._status_file.write()

    def pilot(self, round: int, metrics: Mapping[str, Any]) -> None:
        """A Pilot round ended (1-based). A replayed round is not written again."""
        with self._lock:
            now = self._record("pilot", metrics, axis="round", round=round)
            self._pilot_rate.add(now, round)
            self._tokens += float(metrics.get("tokens", 0))
            self._token_rate.add(now, self._tokens)
            self._set_gauges("pilot", {"tokens_per_second": self._token_rate.per_second()})

    def copilot(self, round: int, step: int, metrics: Mapping[str, Any]) -> None:
        """A Copilot step ended (1-based), trained on the log up to Pilot round `round`. A replayed step is not written again."""
        with self._lock:
            self._copilot_rate.add(self._record("copilot", metrics, axis="step", round=round, step=step), step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """State of the Mistake Log: bytes, rows, lag in rounds. Written at most once per round or LOG_SECONDS."""
        with self._lock:
            written_round, written_at = self._log_written
            due = self._round > written_round or time.time() - written_at >= LOG_SECONDS
            now = self._record("log", metrics, write=due, round=self._round)
            if due:
                self._log_written = (self._round, now)

    def event(self, kind: str, text: str) -> None:
        """Something worth reporting happened. Kind "restart" is counted as a restart; others are shown once, with a count."""
        text = redact(text)
        with self._lock:
            now = self._now()
            self._points.append("event", {"time": now, "round": self._round, "event": kind, "text": text})
            add_event(self._status["events"], now, kind, text)
        self._status_file.touch()

    def waiting(self, who: str, text: str) -> None:
        """What `who` (pilot, copilot, evaluation) does or waits for before it makes progress; an empty text ends it."""
        with self._lock:
            waits = self._status["waiting"]
            if waits.get(who, {}).get("text", "") == text:
                return
            waits.pop(who, None)
            if text:
                waits[who] = {"text": text, "since": time.time()}
            if self._mlflow is not None:
                self._mlflow.set_tag(WAITING_TAG, waiting_text(waits))
        self._status_file.write()

    def process(self, name: str, pid: int) -> None:
        """A worker process (`pilot-0`, `copilot-1`) runs as `pid` on its node; shown in the status."""
        with self._lock:
            self._status["processes"][name] = pid
        self._status_file.write()

    def plan(self, rounds_total: int, copilot_steps_total: int, **more: Any) -> None:
        """What the run will do: bounds of the progress bars and of the ETA. `more`: JSON values shown in the status."""
        self._set(plan={"rounds_total": rounds_total, "copilot_steps_total": copilot_steps_total, **more})

    def phase(self, name: str) -> None:
        """The run enters one of PHASES."""
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}; phases are {', '.join(PHASES)}")
        self._set(phase=name)

    def evaluation(self, table: Mapping[str, Any], markdown: str) -> None:
        """Results on held-out data: `table` a JSON tree whose numbers become metrics, `markdown` the report."""
        with self._lock:
            self._record("evaluation", dict(_numbers("", table)), axis="round", round=self._round)
            if self._mlflow is not None:
                self._mlflow.log_text(markdown, "evaluation.md")
        self._set(evaluation=finite(json.loads(json.dumps(table, default=float))))

    def artifact(self, path: Path | str, name: str | None = None) -> None:
        """Keep a file or folder in MLflow, under artifact folder `name`. Returns at once; `finish` waits for the copy."""
        path = Path(path)
        if not path.exists():
            self.event("tracking", f"artifact {path} does not exist")
        elif self._mlflow is not None:
            self._mlflow.log_path(path, name)

    def finish(self, status: str) -> Status:
        """End as `status` (see ENDS): draw losses.png, send everything to MLflow, write the last status and return it."""
        if status not in ENDS:
            raise ValueError(f"unknown end {status!r}; a run ends {', '.join(ENDS)}")
        for who in list(self._status["waiting"]):
            self.waiting(who, "")
        if status != "done":
            self._set(state=status)  # first, as the process may be killed within seconds
        picture = self._folder / LOSSES_FILE
        try:
            draw_losses(self._folder / METRICS_FILE, picture)
        except Exception as error:  # noqa: BLE001 - a picture must not end a run
            self.event("tracking", f"{LOSSES_FILE} could not be drawn: {first_line(error)}")
        if self._mlflow is not None:
            if picture.exists():
                self._mlflow.log_path(picture, None)
            if not self._mlflow.finish(ENDS[status], MLFLOW_SECONDS):
                self.event("mlflow", f"not everything reached MLflow; all of it is in {METRICS_FILE}")
        self._set(state=status, phase=status if status in PHASES else self._status["phase"])
        self._status_file.close()
        return self.status()

    def status(self) -> Status:
        """What the run is doing, as JSON values.

        Keys: run, folder, state (running, done, failed, stopped), phase, started, updated (unix seconds), plan,
        waiting {who: {text, since}}, pilot {round, metrics}, copilot {round, step, metrics}, log {metrics},
        tokens_per_second, rounds_per_minute, eta_seconds (null when unknown), restarts, events (`statusfile.add_event`),
        processes (pid by name), evaluation, mlflow (null when off).
        """
        with self._lock:
            mlflow = self._mlflow and {
                "uri": redact_address(self._mlflow.uri),
                "run_id": self._mlflow.run_id,
                "command": mlflow_command(self._mlflow.uri),
                "errors": self._mlflow.errors,
            }
            return copy.deepcopy(self._status) | {
                "updated": time.time(),
                "tokens_per_second": self._token_rate.per_second(),
                "rounds_per_minute": self._pilot_rate.per_second(60.0),
                "eta_seconds": self._eta_seconds(),
                "restarts": self._points.restarts,
                "mlflow": mlflow,
            }

    def _set(self, **values: Any) -> None:
        """Change values of the status, and write it."""
        with self._lock:
            self._status |= values
        self._status_file.write()

    @property
    def _round(self) -> int:
        return int(self._status["pilot"].get("round", 0))

    def _now(self) -> float:
        """Unix time, at least a millisecond after the last one: MLflow distinguishes points of one round by it alone."""
        self._latest_time = max(time.time(), self._latest_time + 0.001)
        return self._latest_time

    def _record(
        self, kind: str, metrics: Mapping[str, Any], *, axis: str | None = None, write: bool = True, **at: int
    ) -> float:
        """Take in one measurement: for status, Ray's gauges and, if `write`, metrics.jsonl and so MLflow. Returns its time.

        Args:
            axis: "round" or "step": a metric that was written there before is not written again; None: always written.
            at: `round` and, of the Copilot, `step`.
        """
        now, numbers = self._now(), plain_numbers(metrics)
        if kind != "evaluation":
            self._status[kind] = {**at, "metrics": numbers}
        if write:
            self._points.append(kind, {"time": now, **at, "metrics": numbers}, None if axis is None else at[axis])
        self._set_gauges(kind, {**at, **numbers})
        self._status_file.touch()
        return now

    def _set_gauges(self, kind: str, numbers: Mapping[str, float | None]) -> None:
        """Show numbers at Ray's Prometheus endpoint as `ray_tc_ray_KIND_NAME`, with the run's name as label `run`."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, value in numbers.items():
            full = re.sub(r"\W", "_", f"tc_ray_{kind}_{name}", flags=re.ASCII)
            if value is not None:
                if full not in self._gauges:
                    self._gauges[full] = Gauge(full, f"{name} of the {kind}", ("run",))
                self._gauges[full].set(value, {"run": self._status["run"]})

    def _eta_seconds(self) -> float | None:
        """Time until both models have done their plan; None outside training."""
        if self._status["state"] != "running" or self._status["phase"] not in ("train", "catch-up"):
            return None
        waits, plan = [], self._status["plan"]
        for rate, now, total in (
            (self._pilot_rate, self._round, plan.get("rounds_total")),
            (self._copilot_rate, self._status["copilot"].get("step", 0), plan.get("copilot_steps_total")),
        ):
            speed = rate.per_second()
            if total and total > now:
                if not speed:
                    return None
                waits.append((total - now) / speed)
        return max(waits, default=0.0)

    def _mlflow_failed(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end MLflow's thread
            self.event("mlflow", text)


class Rate:
    """Speed of a growing number over its last RATE_WINDOW readings."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW)

    def add(self, at: float, value: float) -> None:
        """Add a reading; a smaller one (a replay after a crash) empties the window first."""
        if self._readings and value < self._readings[-1][1]:
            self._readings.clear()
        self._readings.append((at, value))

    def per_second(self, scale: float = 1.0) -> float | None:
        """Growth a second times scale; None before two readings."""
        if len(self._readings) < 2:
            return None
        (t0, v0), (t1, v1) = self._readings[0], self._readings[-1]
        return scale * (v1 - v0) / (t1 - t0) if t1 > t0 else None


def start_tracker(config: RunConfig, folder: Path) -> Any:
    """Start the Tracker as a Ray actor on the caller's node, wait until it is ready, and return its handle.

    It takes no CPU and is restarted if it dies, as all it knows is in the run folder. Raises TrackingError as `Tracker` does.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # resolved here, as a worker process on a cluster does not see the caller's environment
    uri = resolve_uri(config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 3, "max_task_retries": 3, "scheduling_strategy": here}
    # An error in an actor's constructor reaches the caller only as a dead actor, so what can fail is tried here first.
    check_places(folder)
    if config.tracking.enabled:
        open_run(config, folder, uri)
    tracker = ray.remote(Tracker).options(**options).remote(config, folder, uri, was_opened=True)
    ray.get(tracker.status.remote())
    return tracker


def check_places(folder: Path) -> None:
    """Raise TrackingError if a file that the Tracker writes is a folder."""
    for name in (METRICS_FILE, STATUS_FILE, RUN_ID_FILE):
        if (folder / name).is_dir():
            raise TrackingError(f"{folder / name} is a folder, and the run writes a file of that name: move it away")


def _status_before(folder: Path) -> tuple[Status, str]:
    """Status of an earlier start, or an empty one and, if its file is damaged, the reason."""
    try:
        return read_status(folder), ""
    except FileNotFoundError:
        return {}, ""
    except DamagedFileError as error:
        return {}, f"the status of an earlier start is lost: {first_line(error)}"


def _numbers(prefix: str, tree: Mapping[str, Any]) -> Any:
    """Numeric leaves of a JSON tree as dotted names; lists and texts are left out."""
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _numbers(name, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value
