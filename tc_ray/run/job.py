"""A run as a list of phases, from the recipe to the exported fused model: the story, and how it begins and ends.

Each phase leaves its result in the run folder. The same command on the same folder skips the phases that are done and resumes
the others from their last checkpoints. Called by the command line and by jobs/train.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_ray.cluster.failures import reason
from tc_ray.cluster.measure import peak_memory
from tc_ray.cluster.session import check_room, ray_session
from tc_ray.cluster.signals import end_within, resumable
from tc_ray.config.load import require_secrets
from tc_ray.config.named import check_named
from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.table.errors import LeaseLostError
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import is_table, repair
from tc_ray.run.evaluate import evaluate, export
from tc_ray.run.folder import FolderLock, check_owner
from tc_ray.run.prepare import open_run, prepare
from tc_ray.run.state import JobError, Run, check_resume
from tc_ray.run.train import copilot_is_done, finish_copilot, pilot_is_done, start_copilot, train_pilot
from tc_ray.tracking.statusfile import ProgressView, note_failure
from tc_ray.tracking.targets import check_installed

END_SECONDS = 20.0
"""Time for a stopped run to end its workers, after its status is written."""
LOG_POLL_SECONDS = 1.0
MAINTENANCE_SECONDS = 5.0


@dataclass(frozen=True)
class Phase:
    """One step of a run. status: the phase that status and progress show. needs, leaves: what it reads and writes.

    skip: whether a start passes over it, since an earlier one did it or the run has no such part; None: every start does it.
    """

    status: str
    work: Callable[[Run], None]
    needs: str
    leaves: str
    skip: Callable[[Run], bool] | None = None


PHASES = (
    Phase("prepare", prepare, "recipe, models, data files", "data/"),
    Phase("prepare", open_run, "data/", "log/, config.yaml"),
    Phase("train", start_copilot, "log/", "learners, at work", skip=copilot_is_done),
    Phase("train", train_pilot, "data/", "pilot/final, log/", skip=pilot_is_done),
    Phase("catch-up", finish_copilot, "learners, log/", "copilot/final", skip=lambda run: run.copilot is None),
    Phase("evaluate", evaluate, "pilot/final, copilot/final", "evaluation/", skip=lambda run: run.ledger is None),
    Phase("export", export, "both models, evaluation/", "export/", skip=lambda run: run.ledger is None),
)
"""Both models train at once from `start_copilot` to `finish_copilot` (`run.train`)."""


@dataclass(frozen=True)
class JobResult:
    """Where the run's results are. report is None when the log is off (plain fine-tuning)."""

    folder: Path
    export: Path | None
    report: Any
    mlflow_command: str | None


class NoCopilotError(JobError):
    """The Copilot failed for good. The Pilot is trained, measured and exported all the same: `result` says where."""

    def __init__(self, why: str, result: JobResult) -> None:
        super().__init__(
            f"{why}. The Pilot is trained, measured alone and exported with lambda 0 ({result.export}). The same command "
            "tries the Copilot again, from its last checkpoint"
        )
        self.result = result


def run_job(config: RunConfig) -> JobResult:
    """Run (or resume) the whole job; blocks until it is done and prints progress.

    Raises:
        ConfigError, JobError, PilotError, CopilotError, DataError, ...: one clear message each; the run folder stays resumable.
    """
    began = time.time()
    require_secrets(config)
    check_installed(config)
    check_named(config)
    folder = config.run.path
    config.run.folder = folder  # absolute: workers have other working directories
    if config.log.path is not None:
        config.log.path = Location(config.log.path).uri
    if folder.exists():
        check_owner(folder, trusted=config.run.trust_folder)
    check_resume(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    # `resumable` also around the start of Ray, as the folder may hold an earlier start
    with FolderLock(folder, f"run {config.run.name}"), _noted(config), resumable(folder), ray_session(config):
        check_room(config)
        run = Run(config, folder, Location(config.log_location, config.log.storage_options), began=began)
        run.times["ray"] = time.time() - began
        with resumable(folder), _leased(run):
            return _work(run)


@contextmanager
def _noted(config: RunConfig) -> Iterator[None]:
    """A failure before the run has its Tracker, such as bad data, stands in the status too."""
    try:
        yield
    except Exception as error:
        note_failure(config.run.path, config.run.name, reason(error))
        raise


@contextmanager
def _leased(run: Run) -> Iterator[None]:
    """Hold the lease of the run's log, which takes over a dead holder's. `open_run` takes the lease of a log that it makes."""
    repair(run.log)
    if run.config.log.enabled and is_table(run.log):
        run.lease = RunLease.take(run.log, f"run {run.config.run.name}")
    try:
        yield
    finally:
        if run.lease is not None:
            run.lease.release()


def _work(run: Run) -> JobResult:
    """All phases in order. At their end, also by an error or a signal, the status is written and workers and threads end."""
    import ray

    from tc_ray.tracking.mlflow_address import mlflow_command, resolve_uri

    end, status, why, shown = threading.Event(), "failed", None, PHASES[0].status
    watchers = start_watchers(run, end)
    try:
        with resumable(run.folder):  # prints how to resume first, as the process may be killed within seconds
            for phase in PHASES:
                run.check_lease()
                if phase.skip is not None and phase.skip(run):
                    continue
                if phase.status != shown:
                    shown = phase.status
                    run.tracker.phase.remote(shown)
                with run.timed(phase.work.__name__):
                    phase.work(run)
            mlflow = mlflow_command(resolve_uri(run.config)) if "mlflow" in run.config.tracking.targets else None
            result = JobResult(run.folder, run.export, run.report, mlflow)
            if run.no_copilot is not None:
                raise NoCopilotError(run.no_copilot, result)
        status = "done"
        return result
    except KeyboardInterrupt:
        status = "stopped"
        raise
    except Exception as error:
        run.check_lease()  # if another process has taken the log, that is the error to report
        why = reason(error)
        raise
    finally:
        end.set()
        if run.tracker is not None:
            ray.get(run.tracker.finish.remote(status, why))
        if status == "stopped":
            end_within(END_SECONDS)
        if run.copilot is not None:
            run.copilot.stop()
        for thread in watchers:
            thread.join(10)


def start_watchers(run: Run, end: threading.Event) -> list[threading.Thread]:
    """Start both threads, which work from when the run has its Tracker until `end`; progress is then shown once more."""
    threads = [threading.Thread(target=work, args=(run, end), daemon=True) for work in (_show, _watch_log)]
    for thread in threads:
        thread.start()
    return threads


def _watch_log(run: Run, end: threading.Event) -> None:
    """Once a second, report the log's size and the Copilot's lag to the Tracker; sometimes ask for maintenance.

    Maintenance also reads the table, so a lost lease is found there and neither Pilot nor Copilot goes on.
    """
    import ray

    maintained = time.monotonic()
    while not end.wait(LOG_POLL_SECONDS):
        if run.ledger is None or run.tracker is None:
            continue
        if time.monotonic() > maintained + MAINTENANCE_SECONDS or (run.lease is not None and run.lease.lost):
            run.ledger.maintain_soon.remote()
            run.tracker.memory.remote(run.ledger.peak_memory.remote())
            run.tracker.memory.remote(peak_memory("driver"))
            maintained = time.monotonic()
        try:
            state = ray.get(run.ledger.state.remote())
        except LeaseLostError:
            return
        if run.copilot is not None:
            run.copilot.release_pilot()
        run.tracker.log.remote(
            {
                "bytes": state.bytes,
                "rows": state.rows,
                "files": state.files,
                "round": state.round,
                "version": state.version,
                "dropped_records": state.dropped,
                "quarantined_files": state.quarantined,
                "lag_rounds": max(0, state.round - state.copilot_round),
            }
        )


def _show(run: Run, end: threading.Event) -> None:
    import ray

    def status() -> Any:
        if run.tracker is None:
            return None
        try:
            return ray.get(run.tracker.status.remote())
        except ray.exceptions.RayActorError:
            return None  # it is being restarted

    ProgressView().follow(status, end)
