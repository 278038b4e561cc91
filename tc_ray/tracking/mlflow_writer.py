"""The one writer of MLflow: opens or continues a run, then sends metrics.jsonl from a background thread.

Invariant: after `open_run` callers never wait for MLflow and never see its errors, which are counted; the first is passed to
`on_error`. Points that could not be sent are sent when MLflow answers again, each once; metrics.jsonl has them. Used by
`tracker.Tracker`.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from tc_ray.config.fields import public_values
from tc_ray.config.redact import redact, redact_address
from tc_ray.config.schema import RunConfig
from tc_ray.config.tracking import TRACKING_VARIABLE
from tc_ray.files import DamagedFileError, read_json, write_json
from tc_ray.text import first_line
from tc_ray.tracking.mlflow_address import (
    EXPERIMENT_VARIABLE,
    experiment_id,
    experiment_name,
    refused_soon,
    resolve_uri,
    sqlite_file,
)
from tc_ray.tracking.points import Point, read_lines
from tc_ray.tracking.targets import TrackingError, axis_of

RUN_ID_FILE = "mlflow.json"
PARAM_CHARACTERS = 500
BATCH_METRICS = 1000
BATCH_PARAMS = 100
BATCH_POINTS = 200
SEND_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MlflowRun:
    """An open MLflow run, and the tracking URI of its store."""

    uri: str
    run_id: str


def flat_params(config: RunConfig) -> dict[str, str]:
    """The config as dotted keys; values are cut to PARAM_CHARACTERS."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in public_values(config).items()}
    return {k: v[:PARAM_CHARACTERS] for k, v in texts.items()}


class MlflowWriter:
    """A thread in front of one MLflow run: each second it sends what metrics.jsonl has gained, then what was asked for.

    Args:
        run: from `open_run`.
        points: the run's metrics.jsonl; points of an earlier start that MLflow lacks are sent too.
        on_error: called from the thread with one line when MLflow fails for the first time.
    """

    def __init__(self, run: MlflowRun, points: Path, on_error: Callable[[str], None]) -> None:
        self.run = run
        self.errors = 0
        self._client = MlflowClient(tracking_uri=run.uri)
        self._points, self._on_error = points, on_error
        self._sent = 0
        """Bytes of the file that MLflow has."""
        self._unsure = points.stat().st_size
        """MLflow may have points before this byte, so it is asked: an earlier start, or a call that failed, sent them."""
        self._asked: deque[Callable[[MlflowClient, str], Any]] = deque()
        self._uploads: deque[Callable[[MlflowClient, str], Any]] = deque()
        self._end, self._ended_as, self._is_complete = threading.Event(), "", False
        self._is_ended, self._is_uploaded = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def ask(self, call: Callable[[MlflowClient, str], Any]) -> None:
        """Queue something to do with the client and the run's id. It is tried once."""
        self._asked.append(call)

    def upload(self, call: Callable[[MlflowClient, str], Any]) -> None:
        """Queue what may take long, as `ask` does, for after the run's end: MLflow takes it of an ended run too."""
        self._uploads.append(call)

    def finish(self, mlflow_status: str, timeout_s: float) -> bool:
        """Send the rest and set the run's status; then the uploads begin. False: not done within timeout_s, or MLflow fails."""
        self._ended_as = mlflow_status
        self._end.set()
        self._is_ended.wait(timeout_s)
        return self._is_complete

    def finish_uploads(self, timeout_s: float) -> bool:
        """After `finish`: wait for the uploads. False: one has not ended within timeout_s, or has failed."""
        self._thread.join(timeout_s)
        return self._is_uploaded

    def _work(self) -> None:
        ending = False
        try:
            while not ending:
                ending = self._end.wait(SEND_SECONDS)
                errors = self.errors
                self._attempt(self._send_points)
                while self._asked:
                    self._attempt(self._asked.popleft(), self._client, self.run.run_id)
            self._attempt(self._client.set_terminated, self.run.run_id, self._ended_as)
            self._is_complete = self.errors == errors
        finally:
            self._is_ended.set()
        errors = self.errors
        while self._uploads:
            self._attempt(self._uploads.popleft(), self._client, self.run.run_id)
        self._is_uploaded = self.errors == errors

    def _send_points(self) -> None:
        present: dict[str, set[tuple[int, int]]] = {}
        run_id, lines = self.run.run_id, read_lines(self._points, self._sent)
        while some := list(itertools.islice(lines, BATCH_POINTS)):
            metrics = [metric for _, point in some if point is not None for metric in _to_mlflow(point)]
            if self._sent < self._unsure:
                for key in {metric.key for metric in metrics} - set(present):
                    present[key] = {(m.step, m.timestamp) for m in self._client.get_metric_history(run_id, key)}
                metrics = [m for m in metrics if (m.step, m.timestamp) not in present[m.key]]
            for first in range(0, len(metrics), BATCH_METRICS):
                self._client.log_batch(run_id, metrics=metrics[first : first + BATCH_METRICS])
            self._sent = some[-1][0]

    def _attempt(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - tracking must not end a run, whatever the store raises
            self.errors += 1
            self._unsure = self._points.stat().st_size
            if self.errors == 1:
                why = redact(first_line(error))
                self._on_error(f"MLflow fails, the run continues and sends the missing points when it answers: {why}")


def _to_mlflow(point: Point) -> list[Metric]:
    """The MLflow metrics of one point: key `kind/name`, step = round, of the Copilot its own step. Events and starts have none.

    A point of the Copilot has the Pilot's round as one more metric, `copilot/round`.

    What MLflow allows in no name becomes `_` (Hit@10: Hit_10), since it refuses the whole batch for one name.
    """
    time_ms, metrics, (axis, place) = round(point["time"] * 1000), point.get("metrics", {}), axis_of(point)
    if axis == "step":
        metrics = {**metrics, "round": point["round"]}
    names = {re.sub(r"[^\w.: -]", "_", name): value for name, value in metrics.items()}
    return [
        Metric(f"{point['kind']}/{name}", float("nan") if value is None else value, time_ms, place)
        for name, value in names.items()
    ]


def open_run(config: RunConfig, folder: Path) -> MlflowRun:
    """Continue the MLflow run named in the run folder's mlflow.json, or start one.

    MLflow refuses a changed param, so it keeps its first value and the new one goes into a tag `changed.<key>`. Raises
    TrackingError if the tracking URI is unknown, unreachable or not writable.
    """
    uri = resolve_uri(config)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # a new database logs each of its migrations
    try:
        file = sqlite_file(uri)
        if file is not None:  # MLflow would try for minutes to make a database that cannot be written
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        with refused_soon():
            run_id = _open(MlflowClient(tracking_uri=uri), config, folder, uri)
    except TrackingError:
        raise
    except Exception as error:
        why = redact(first_line(error))
        mend = "Give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; or correct"
        mend = mend if re.search(r"\b40[13]\b", why) else "Correct"
        raise TrackingError(
            f"MLflow cannot be used at {redact_address(uri)!r}: {why}. {mend} tracking.uri or {TRACKING_VARIABLE}, or take "
            "mlflow out of tracking.to"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_ID_FILE, asdict(MlflowRun(redact_address(uri), run_id)))
    return MlflowRun(uri, run_id)


def _open(client: MlflowClient, config: RunConfig, folder: Path, uri: str) -> str:
    run_id = _known_run(client, folder, uri) or _new_run(client, config, folder, uri)
    known = client.get_run(run_id).data.params
    wanted = flat_params(config)
    params = [Param(k, v) for k, v in wanted.items() if k not in known]
    for first in range(0, len(params), BATCH_PARAMS):
        client.log_batch(run_id, params=params[first : first + BATCH_PARAMS])
    changed = [RunTag(f"changed.{k}", v) for k, v in wanted.items() if known.get(k, v) != v]
    client.log_batch(run_id, tags=changed)
    client.update_run(run_id, status="RUNNING")
    return run_id


def _known_run(client: MlflowClient, folder: Path, uri: str) -> str | None:
    """The run that mlflow.json names, if it is in this store: to another one the whole run is copied from metrics.jsonl."""
    try:
        known = read_json(folder / RUN_ID_FILE)
        if known.get("uri") != redact_address(uri):
            return None
        run = client.get_run(known["run_id"])
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else None
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        log.warning("%s: a new MLflow run is opened, with all points of this run", error)
        return None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _new_run(client: MlflowClient, config: RunConfig, folder: Path, uri: str) -> str:
    tags = {"tc_ray.folder": str(folder)}
    if config.tracking.parent_run is not None:
        tags["mlflow.parentRunId"] = config.tracking.parent_run
    made = client.create_run(_experiment(client, config, uri), run_name=config.run.name, tags=tags)
    return str(made.info.run_id)


def _experiment(client: MlflowClient, config: RunConfig, uri: str) -> str:
    """Id of the run's experiment, which is made where it is not there."""
    given = experiment_id(config)
    if given is not None:
        return str(client.get_experiment(given).experiment_id)
    name = experiment_name(config)
    found = client.get_experiment_by_name(name)
    if found is None:
        # without it, a local store puts artifacts under the working directory of the writing process
        location = (config.run.path.parent / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
        return str(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {name!r} at {redact_address(uri)} is deleted: restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}), or name another one in tracking.experiment or {EXPERIMENT_VARIABLE}"
        )
    return str(found.experiment_id)
