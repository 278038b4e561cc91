"""The Tracker: the one place where a run's metrics meet, and the one writer of its metrics, status and MLflow.

Invariant: a (metric, round) or (Copilot metric, step) is written once, over worker crashes and resumed runs. Nothing here
waits for MLflow before `finish`, and after the start no MLflow error reaches the run. All that a restarted Tracker needs is in
metrics.jsonl. The job starts it as an actor (`start_tracker`); Pilot, Copilot and Ledger call it without waiting for an
answer. Every measurement passes through `Tracker._record`. The progress view and the picture know pilot `loss`, `tokens` (of
the round); copilot `loss`; those named in `Tracker.error_ratio`; log `bytes`, `lag_rounds`. Any other metric is written too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tc_ray.cluster.measure import peak_memory
from tc_ray.config.redact import redact, redact_address, remember
from tc_ray.config.schema import RunConfig
from tc_ray.files import finite, write_json
from tc_ray.text import first_line
from tc_ray.tracking.datasets import UsedRows, dataset_inputs
from tc_ray.tracking.follower import Follower
from tc_ray.tracking.logged_model import ModelToLog, log_model
from tc_ray.tracking.mlflow_address import mlflow_command, take_variables, tracker_variables
from tc_ray.tracking.mlflow_writer import MlflowRun, MlflowWriter, flat_params, open_run
from tc_ray.tracking.points import LOSSES_FILE, PointFile, draw_losses, numbers_of, plain_numbers
from tc_ray.tracking.statusfile import METRICS_FILE, STATUS_FILE, STATUS_SECONDS, Status
from tc_ray.tracking.targets import open_target

ENDS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""Ways a run ends -> MLflow's words for them."""
RATE_WINDOW = 64
MLFLOW_SECONDS = 120.0
"""Longest wait at the end for MLflow to have the metrics and the run's state."""
UPLOAD_SECONDS = 120.0
"""Longest wait for the upload of the model after that."""
FOLLOWER_SECONDS = 30.0
"""The same for each of the others."""
log = logging.getLogger(__name__)


class Tracker:
    """Writes metrics.jsonl, status.json, MLflow, the other trackers of the config and, at the end, losses.png.

    Args:
        config: the run's config.
        folder: run folder; the metrics of an earlier start are continued. An event says which lines of them are damaged.
        plan: rounds_total and copilot_steps_total, the bounds of progress and ETA.
        mlflow: the open MLflow run; None: without MLflow.
        used: the rows of the run, which MLflow gets as its dataset inputs.
        variables: the caller's `MLFLOW_*` variables (user, password, token, certificates), which hold for this process too.
        began: unix time at which the driver began this start of the run; None: now.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        plan: dict[str, int] | None = None,
        mlflow: MlflowRun | None = None,
        used: Sequence[UsedRows] = (),
        variables: Mapping[str, str] | None = None,
        began: float | None = None,
    ) -> None:
        remember(config.secrets())  # in this process too: an event's text may hold any of them
        take_variables(variables or {})
        self._lock = threading.RLock()
        self._folder = folder
        self._points = PointFile(folder / METRICS_FILE)
        self._status: Status = {
            "run": config.run.name,
            "folder": str(folder),
            "state": "running",
            "phase": "prepare",
            "started": self._points.started or time.time(),
            "plan": plan or {},
            "waiting": {},
            "failure": None,
            **{kind: self._points.latest(kind) for kind in ("pilot", "copilot", "validation", "error_ratio", "log")},
            "processes": {},
            "evaluation": self._points.latest("evaluation"),
        }
        self._plan = plan or {}
        self._shorten_plan()
        self._latest_time = 0.0
        self._readings: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=RATE_WINDOW) for name in ("pilot", "copilot", "tokens")
        }
        self._tokens = 0.0
        self._gauges: dict[str, Any] = {}
        self._peaks: dict[str, float] = {}
        self._mlflow = mlflow and MlflowWriter(mlflow, folder / METRICS_FILE, self._failed)
        if self._mlflow and used:
            self._mlflow.ask(lambda client, run_id: client.log_inputs(run_id, dataset_inputs(used)))
        self._followers = [
            Follower(
                name, partial(open_target, name, config, folder, flat_params(config)), self._points.path, self._failed
            )
            for name in config.tracking.targets
            if name != "mlflow"
        ]
        now = self._now()
        self._points.append("start", {"time": now, "round": self._round, "began": now if began is None else began})
        if self._points.damage:
            self.event("tracking", f"{METRICS_FILE}: {self._points.damage}")
        self._ended = threading.Event()
        self._failing = False
        self._write_status()
        threading.Thread(target=self._work, name="status-file", daemon=True).start()

    def pilot(self, round: int, metrics: Mapping[str, Any]) -> None:
        """A Pilot round ended (1-based). A replayed round is not written again."""
        with self._lock:
            now = self._record("pilot", metrics, axis=round, round=round)
            self._tokens += float(metrics.get("tokens", 0))
            self._read("pilot", now, round)
            self._read("tokens", now, self._tokens)
            self._set_gauges("pilot", {"tokens_per_second": self._speed("tokens")})

    def copilot(self, round: int, step: int, metrics: Mapping[str, Any]) -> None:
        """A Copilot step ended (1-based), trained on the log up to Pilot round `round`. A replayed step is not written again."""
        with self._lock:
            self._read("copilot", self._record("copilot", metrics, axis=step, round=round, step=step), step)

    def validation(self, round: int, metrics: Mapping[str, Any]) -> None:
        """The Pilot was measured on validation rows after a round. `nll`, `lowest`, `best_round` are shown; `ended`: it ends early."""
        with self._lock:
            self._record("validation", metrics, axis=round, round=round)
            self._shorten_plan()

    def error_ratio(self, round: int, metrics: Mapping[str, Any]) -> None:
        """The Copilot was measured on records up to `round` that it had not trained on. `held_out`, `in_sample`, `lam` are shown."""
        with self._lock:
            self._record("error_ratio", metrics, axis=round, round=round)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """State of the Mistake Log: bytes, rows, lag in rounds. Written once per round."""
        with self._lock:
            self._record("log", metrics, axis=self._round, round=self._round)

    def event(self, kind: str, text: str) -> None:
        """Something worth reporting happened. Kind "restart" is counted as a restart; others are shown once, with a count."""
        with self._lock:
            point = {"time": self._now(), "round": self._round, "event": kind, "text": redact(text)}
            self._points.append("event", point)

    def waiting(self, who: str, text: str) -> None:
        """What `who` (pilot, copilot, evaluation) does or waits for before it makes progress; an empty text ends it."""
        with self._lock:
            waits = self._status["waiting"]
            if waits.get(who, {}).get("text", "") == text:
                return
            waits.pop(who, None)
            if text:
                waits[who] = {"text": text, "since": time.time()}
        self._write_status()

    def spent(self, seconds: Mapping[str, float]) -> None:
        """Parts of the run took so many seconds each. A part may come again: `tc-ray report` adds them."""
        with self._lock:
            self._append("time", seconds)

    def memory(self, peaks: Mapping[str, float]) -> None:
        """Peak memory of processes by name, in bytes. What has not grown by a hundredth is not written again."""
        with self._lock:
            grown = {name: size for name, size in peaks.items() if size > 1.01 * self._peaks.get(name, 0.0)}
            if grown:
                self._peaks |= grown
                self._append("memory", grown)

    def process(self, name: str, pid: int) -> None:
        """A worker process (`pilot-0`, `copilot-1`) runs as `pid` on its node; shown in the status."""
        with self._lock:
            self._status["processes"][name] = pid
        self._write_status()

    def phase(self, name: str) -> None:
        """The run enters a phase."""
        self._write_status(phase=name)

    def evaluation(self, table: Mapping[str, Any], markdown: str) -> None:
        """Results on held-out data: `table` a JSON tree whose numbers become metrics, `markdown` the report."""
        with self._lock:
            self._record("evaluation", dict(numbers_of("", table)), axis=self._round, round=self._round)
        if self._mlflow:
            self._mlflow.ask(lambda client, run_id: client.log_text(run_id, markdown, "evaluation.md"))
        self._write_status(evaluation=json.loads(json.dumps(table, default=float)))

    def model(self, model: ModelToLog) -> None:
        """Keep the exported model in MLflow, and in its registry if it has a name there. Returns at once; `finish` uploads it."""
        if self._mlflow:
            self._mlflow.upload(lambda client, run_id: log_model(client, run_id, model))

    def finish(self, status: str, failure: str | None = None) -> Status:
        """End as `status` (see ENDS): draw losses.png, send everything to MLflow, write the last status and return it.

        failure: why a run has failed, shown by `tc-ray status`.
        """
        self._status |= {"waiting": {}, "failure": failure and redact(failure)}
        if status != "done":
            self._write_status(state=status)  # first, as the process may be killed within seconds
        picture = self._folder / LOSSES_FILE
        try:
            draw_losses(self._folder / METRICS_FILE, picture)
        except Exception as error:  # noqa: BLE001 - a picture must not end a run
            self.event("tracking", f"{LOSSES_FILE} could not be drawn: {first_line(error)}")
        if self._mlflow:
            if picture.exists():
                self._mlflow.ask(lambda client, run_id: client.log_artifact(run_id, str(picture)))
            if not self._mlflow.finish(ENDS[status], MLFLOW_SECONDS):
                self._failed(f"not everything reached MLflow; all of it is in {METRICS_FILE}")
            elif not self._mlflow.finish_uploads(UPLOAD_SECONDS):
                self._failed(
                    f"the upload of the model to MLflow failed, or did not end within {UPLOAD_SECONDS:.0f} s; MLflow has the run's "
                    "metrics and state, and the run's folder the model: start the run again to upload it"
                )
        for follower in self._followers:
            if not follower.finish(status == "done", FOLLOWER_SECONDS):
                self._failed(f"not everything reached {follower.name}; all of it is in {METRICS_FILE}")
        self._ended.set()
        self._write_status(state=status, phase=self._status["phase"] if status == "stopped" else status)
        return self.status()

    def status(self) -> Status:
        """What the run is doing, as JSON values.

        Keys: run, folder, state (running, done, failed, stopped), phase, started, updated (unix seconds), plan,
        waiting {who: {text, since}}, failure (why it failed, else null), pilot {round, metrics}, copilot {round, step, metrics},
        validation and error_ratio {round, metrics},
        log {metrics},
        tokens_per_second, rounds_per_minute, eta_seconds (null when unknown), restarts, events {time, kind, text, count},
        processes (pid by name), evaluation, mlflow (null when off).
        """
        with self._lock:
            rounds = self._speed("pilot")
            return copy.deepcopy(self._status) | {
                "updated": time.time(),
                "tokens_per_second": self._speed("tokens"),
                "rounds_per_minute": rounds and 60 * rounds,
                "eta_seconds": self._eta_seconds(),
                "restarts": self._points.restarts,
                "events": copy.deepcopy(self._points.events),
                "mlflow": self._mlflow
                and {
                    "uri": redact_address(self._mlflow.run.uri),
                    "run_id": self._mlflow.run.run_id,
                    "command": mlflow_command(self._mlflow.run.uri),
                    "errors": self._mlflow.errors,
                },
            }

    def _write_status(self, **values: Any) -> None:
        """Change values of the status, and write it. A file that cannot be written stops nothing."""
        with self._lock:
            self._status |= values
            try:
                write_json(self._folder / STATUS_FILE, finite(self.status()), indent=1)
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.warning("%s cannot be written (%s); it is tried again", self._folder / STATUS_FILE, error)
                self._failing = True

    def _work(self) -> None:
        while not self._ended.wait(STATUS_SECONDS):
            self._write_status()
            with contextlib.suppress(OSError):  # a full disk must not end this thread
                self.memory(peak_memory("tracker"))

    def _shorten_plan(self) -> None:
        """After the Pilot's early end less is left to do than was planned."""
        point, plan = self._status["validation"], self._plan
        total = plan.get("rounds_total", 0)
        self._status["plan"] = plan
        if point.get("metrics", {}).get("ended") and point["round"] < total:
            steps = plan.get("copilot_steps_total", 0) * point["round"] // total
            self._status["plan"] = {"rounds_total": point["round"], "copilot_steps_total": steps}

    @property
    def _round(self) -> int:
        return int(self._status["pilot"].get("round", 0))

    def _now(self) -> float:
        """Unix time, at least a millisecond after the last one: MLflow distinguishes points of one round by it alone."""
        self._latest_time = max(time.time(), self._latest_time + 0.001)
        return self._latest_time

    def _record(self, kind: str, metrics: Mapping[str, Any], *, axis: int, **at: int) -> float:
        """Take in one measurement: for status, Ray's gauges, metrics.jsonl and so MLflow. Returns its time.

        Args:
            axis: round or step: a metric that was written there before is not written again.
            at: `round` and, of the Copilot, `step`.
        """
        now, numbers = self._now(), plain_numbers(metrics)
        if kind != "evaluation":
            self._status[kind] = {**at, "metrics": numbers}
        self._points.append(kind, {"time": now, **at, "metrics": numbers}, axis)
        self._set_gauges(kind, {**at, **numbers})
        return now

    def _append(self, kind: str, metrics: Mapping[str, Any]) -> None:
        point = {"time": self._now(), "round": self._round, "metrics": plain_numbers(metrics)}
        self._points.append(kind, point)

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

    def _read(self, name: str, at: float, value: float) -> None:
        """Add a reading of a growing number; a smaller one (a replay after a crash) starts anew."""
        readings = self._readings[name]
        if readings and value < readings[-1][1]:
            readings.clear()
        readings.append((at, value))

    def _speed(self, name: str) -> float | None:
        """Growth a second over the last RATE_WINDOW readings; None before two of them."""
        readings = self._readings[name]
        if len(readings) < 2:
            return None
        return (readings[-1][1] - readings[0][1]) / (readings[-1][0] - readings[0][0])

    def _eta_seconds(self) -> float | None:
        """Time until both models have done their plan; None outside training."""
        if self._status["state"] != "running" or self._status["phase"] not in ("train", "catch-up"):
            return None
        waits, plan = [], self._status["plan"]
        for name, now, total in (
            ("pilot", self._round, plan.get("rounds_total")),
            ("copilot", self._status["copilot"].get("step", 0), plan.get("copilot_steps_total")),
        ):
            if total and total > now:
                speed = self._speed(name)
                if not speed:
                    return None
                waits.append((total - now) / speed)
        return max(waits, default=0.0)

    def _failed(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the thread of a tracker
            self.event("tracking", text)


def start_tracker(
    config: RunConfig,
    folder: Path,
    plan: dict[str, int] | None = None,
    used: Sequence[UsedRows] = (),
    began: float | None = None,
) -> Any:
    """Open MLflow, start the Tracker as a Ray actor on the caller's node, wait until it is ready, and return its handle.

    It takes no CPU and is restarted if it dies, as all it knows is in the run folder; on no other node, because a database file of
    MLflow must be written from one. Raises TrackingError as `open_run` does.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # here, as a worker process on a cluster does not see the caller's environment, and an actor that is restarted while MLflow
    # is away must go on
    variables = tracker_variables()
    mlflow = open_run(config, folder) if "mlflow" in config.tracking.targets else None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 3, "max_task_retries": 3, "scheduling_strategy": here}
    tracker = ray.remote(Tracker).options(**options).remote(config, folder, plan, mlflow, used, variables, began)
    ray.get(tracker.status.remote())
    return tracker
