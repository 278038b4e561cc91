"""The one writer of MLflow: opens or continues a run, then logs in batches from a background thread.

Invariant: after `open_run` callers never wait for MLflow and never see its errors, which are counted and passed to `on_error`.
A point carries the time of its measurement, so sending it again changes nothing. Used by `tracker.Tracker` only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from tc_ray.config.redact import redact, redact_address
from tc_ray.config.schema import TRACKING_VARIABLE, RunConfig
from tc_ray.files import DamagedFileError, read_json_as, write_json
from tc_ray.text import first_line
from tc_ray.tracking.points import Point

RUN_ID_FILE = "mlflow.json"
PARAM_CHARACTERS = 500
BATCH_METRICS = 1000
BATCH_PARAMS = 100
BATCH_SECONDS = 1.0
RECOVERED_SECONDS = 60.0
"""MLflow counts as recovered when nothing has failed for this long."""

log = logging.getLogger(__name__)


class TrackingError(RuntimeError):
    """MLflow cannot be used with this configuration."""


def resolve_uri(config: RunConfig) -> str:
    """Tracking URI: tracking.uri, else MLFLOW_TRACKING_URI, else mlflow.db beside the run folder."""
    return (
        config.tracking.uri or os.environ.get(TRACKING_VARIABLE) or f"sqlite:///{config.run.path.parent / 'mlflow.db'}"
    )


def mlflow_command(uri: str) -> str:
    """The shell command that shows a tracking URI in a browser, or a server's address. Without secrets."""
    shown = redact_address(uri)
    return shown if uri.startswith("http") else f"mlflow ui --backend-store-uri {shown}"


def flat_params(config: RunConfig) -> dict[str, str]:
    """The config as dotted keys; values longer than PARAM_CHARACTERS are cut and end in '...'."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield prefix, text if len(text) <= PARAM_CHARACTERS else text[: PARAM_CHARACTERS - 3] + "..."

    return dict(walk("", config.public_dump()))


def to_mlflow(point: Point) -> list[Metric]:
    """The MLflow metrics of one point: key `kind/name`, step = round. Events and starts have none."""
    time_ms = round(point["time"] * 1000)
    return [
        Metric(f"{point['kind']}/{name}", float("nan") if value is None else value, time_ms, point.get("round", 0))
        for name, value in point.get("metrics", {}).items()
    ]


class MlflowWriter:
    """Queue and thread in front of one MLflow run.

    Args:
        run_id: from `open_run`.
        uri: tracking URI of that run.
        on_error: called from the writer's thread with one line when MLflow fails and one when it has recovered, not for
            each failed call.
    """

    def __init__(self, run_id: str, uri: str, on_error: Callable[[str], None]) -> None:
        self.run_id = run_id
        self.uri = uri
        self.errors = 0
        self._client = MlflowClient(tracking_uri=uri)
        self._on_error = on_error
        self._failing, self._failed_at = False, 0.0
        self._queue: queue.Queue[Metric | Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def log_point(self, point: Point) -> None:
        """Queue the metrics of a point."""
        for metric in to_mlflow(point):
            self._queue.put(metric)

    def set_tag(self, key: str, value: str) -> None:
        """Queue a tag of the run."""
        self._queue.put(lambda: self._client.set_tag(self.run_id, key, value))

    def log_text(self, text: str, name: str) -> None:
        """Queue a text artifact."""
        self._queue.put(lambda: self._client.log_text(self.run_id, text, name))

    def log_path(self, path: Path, name: str | None) -> None:
        """Queue a file (into artifact folder `name`) or a folder (as artifact folder `name`)."""
        log_it = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._queue.put(lambda: log_it(self.run_id, str(path), name))

    def fill_gaps(self, points: Iterable[Point]) -> None:
        """Queue the points that MLflow lacks (a process died between writing the file and sending them)."""
        wanted: dict[str, list[Metric]] = {}
        for point in points:
            for metric in to_mlflow(point):
                wanted.setdefault(metric.key, []).append(metric)

        def send(key: str, metrics: list[Metric]) -> None:
            present = {(m.step, m.timestamp) for m in self._client.get_metric_history(self.run_id, key)}
            self._send([m for m in metrics if (m.step, m.timestamp) not in present])

        self._queue.put(self._clear_failure)
        for key, metrics in wanted.items():
            self._queue.put(lambda key=key, metrics=metrics: send(key, metrics))  # type: ignore[misc]

    def finish(self, mlflow_status: str, timeout_s: float) -> bool:
        """Send the queue, set the run's status, stop the thread. False: not done within timeout_s, or MLflow fails."""
        self._queue.put(lambda: self._client.set_terminated(self.run_id, mlflow_status))
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self._failing

    def _work(self) -> None:
        """Send metrics collected for BATCH_SECONDS; do other work at its place in the queue."""
        batch: list[Metric] = []
        deadline = 0.0
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()) if batch else None)
            except queue.Empty:
                self._attempt(self._send, batch)
                batch = []
                continue
            if isinstance(item, Metric):
                if not batch:
                    deadline = time.monotonic() + BATCH_SECONDS
                batch.append(item)
                if len(batch) < BATCH_METRICS and time.monotonic() < deadline:
                    continue
            if batch:
                self._attempt(self._send, batch)
                batch = []
            if item is None:
                return
            if not isinstance(item, Metric):
                self._attempt(item)

    def _send(self, metrics: list[Metric]) -> None:
        for first in range(0, len(metrics), BATCH_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + BATCH_METRICS])

    def _attempt(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:  # noqa: BLE001 - tracking must not end a run, whatever the store raises
            self.errors += 1
            self._failed_at = time.monotonic()
            if not self._failing:
                self._failing = True
                log.warning("MLflow: %s", redact(str(error)))
                self._on_error(f"MLflow fails, the run continues without it: {redact(first_line(error))}")
        else:
            # not at the first success: a store that can be read but not written alternates
            if self._failing and time.monotonic() - self._failed_at > RECOVERED_SECONDS:
                self._failing = False
                self._on_error("MLflow answers again; it gets the missing points at the end")

    def _clear_failure(self) -> None:
        self._failing = False


def open_run(config: RunConfig, folder: Path, uri: str) -> str:
    """Continue the MLflow run named in the run folder's mlflow.json, or start one. Returns the MLflow run id.

    MLflow refuses a changed param, so it keeps its first value and the new one goes into a tag `changed.<key>`.

    Raises:
        TrackingError: the tracking URI is unknown, unreachable or not writable.
    """
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # a new database logs each of its migrations
    try:
        with _few_retries(uri):
            client = MlflowClient(tracking_uri=uri)
            run_id = _known_run(client, folder, uri) or _new_run(client, config, folder, uri)
            known = client.get_run(run_id).data.params
            wanted = flat_params(config)
            params = [Param(k, v) for k, v in wanted.items() if k not in known]
            for first in range(0, len(params), BATCH_PARAMS):
                client.log_batch(run_id, params=params[first : first + BATCH_PARAMS])
            changed = [RunTag(f"changed.{k}", v) for k, v in wanted.items() if known.get(k, v) != v]
            client.log_batch(run_id, tags=changed)
            client.update_run(run_id, status="RUNNING")
    except Exception as error:
        raise TrackingError(
            f"MLflow cannot be used at {redact_address(uri)!r}: {redact(first_line(error))}. Correct tracking.uri or {TRACKING_VARIABLE}, "
            "or switch MLflow off with tracking.enabled=false"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_ID_FILE, asdict(_RunId(run_id, redact_address(uri), config.tracking.experiment)))
    return run_id


@dataclass(frozen=True)
class _RunId:
    """Content of RUN_ID_FILE."""

    run_id: str
    uri: str
    experiment: str


def _known_run(client: MlflowClient, folder: Path, uri: str) -> str | None:
    try:
        known = read_json_as(folder / RUN_ID_FILE, _RunId)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        log.warning("%s: a new MLflow run is opened, with all points of this run", error)
        return None
    if known.uri != redact_address(uri):
        return None  # another store: the whole run is copied there from metrics.jsonl
    try:
        run = client.get_run(known.run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return str(run.info.run_id) if run.info.lifecycle_stage == "active" else None


def _new_run(client: MlflowClient, config: RunConfig, folder: Path, uri: str) -> str:
    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # without it, a local store puts artifacts under the working directory of the writing process
        location = f"file://{config.run.path.parent / 'mlartifacts'}" if uri.startswith("sqlite") else None
        try:
            experiment_id = client.create_experiment(name, artifact_location=location)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run made it in the meantime
            if experiment is None:
                raise
    if experiment is not None:
        if experiment.lifecycle_stage != "active":
            raise TrackingError(f"experiment {name!r} is deleted there; restore it or set tracking.experiment")
        experiment_id = experiment.experiment_id
    tags = {"tc_ray.folder": str(folder)}
    return str(client.create_run(experiment_id, run_name=config.run.name, tags=tags).info.run_id)


@contextlib.contextmanager
def _few_retries(uri: str) -> Iterator[None]:
    """Report a wrong address within seconds; MLflow's own defaults retry for minutes."""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise TrackingError(f"{path} is not writable")
        path.touch()
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
