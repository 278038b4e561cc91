"""The composition root: one run from data to exported fused model, every part started, watched and ended here.

Phases: prepare (models, data, plan) -> train (Pilot and Copilot side by side) -> catch-up (the Copilot's last steps) ->
evaluate -> export. Each phase leaves its result in the run folder; a run started again on the same folder skips what is
done and goes on from the last checkpoints. Called by the command line and by jobs/train.py.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tc_ray.cluster.session import check_room, copilot_need, pilot_need, ray_session
from tc_ray.cluster.signals import end_within, resumable
from tc_ray.config.load import require_secrets, save_config
from tc_ray.config.schema import RunConfig
from tc_ray.files import is_whole
from tc_ray.mistakelog.table.errors import LeaseLostError
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.opening import is_table
from tc_ray.mistakelog.table.repair import repair
from tc_ray.run.folder_lock import FolderLock
from tc_ray.run.folder_owner import check_owner
from tc_ray.run.refusals import JobError, check_resume
from tc_ray.text import visible

LOG_POLL_SECONDS = 1.0
TEND_SECONDS = 5.0
END_SECONDS = 20.0
"""Time for a stopped run, whose status is written, to give its workers back."""
ERROR_SIZE_ROUNDS = 16
"""Rounds at the end of the log whose mean squared error is set beside that of held-out data."""


class NoCopilotError(JobError):
    """The Copilot failed for good. The Pilot is trained, measured and exported all the same: `result` says where."""

    def __init__(self, why: str, result: JobResult) -> None:
        super().__init__(
            f"{why}. The Pilot is trained, measured alone and exported with lambda 0 ({result.export}). The same command "
            "tries the Copilot again, from its last checkpoint"
        )
        self.result = result


@dataclass(frozen=True)
class JobResult:
    """Where the run's results are. report is None when the log is off (plain fine-tuning)."""

    folder: Path
    export: Path | None
    report: Any
    mlflow_command: str | None


def run_job(config: RunConfig) -> JobResult:
    """Run (or resume) the whole job; blocks until it is done and prints progress.

    Raises:
        ConfigError, JobError, PilotError, CopilotError, DataError, ...: one clear message each; the run folder stays resumable.
    """
    require_secrets(config)
    folder = config.run.path
    config.run.folder = folder  # absolute: workers have other working directories
    if config.log.path is not None:
        config.log.path = Location(config.log.path).uri
    if folder.exists():
        check_owner(folder, trusted=config.run.trust_folder)
    check_resume(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    # also around the start of Ray: a signal that comes then finds a run that can be gone on with, where there is one
    with FolderLock(folder, f"run {config.run.name}"), resumable(folder), ray_session(config):
        check_room(config)
        with resumable(folder):
            return _Job(config, folder).run()


class _Job:
    """The parts of one run while it lasts."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.stop_watching = threading.Event()
        self.ledger: Any = None
        self.log = Location(config.log_location, config.log.storage_options)
        self.lease: RunLease | None = None
        self.tracker: Any = None
        self.group: Any = None
        self.no_copilot: str | None = None
        self.view: threading.Thread | None = None

    def run(self) -> JobResult:
        """All phases, under the lease of the run's log."""
        # before anything is touched, where there is a log already; a first start takes it as soon as there is one
        repair(self.log)
        if self.config.log.enabled and is_table(self.log):
            self.lease = RunLease.take(self.log, f"run {self.config.run.name}")
        try:
            return self._run()
        finally:
            if self.lease is not None:
                self.lease.release()

    def _run(self) -> JobResult:
        from tc_ray.tracking.tracker import start_tracker

        self._prepare()
        self._open_log()
        # saved only now: a run refused for its model or data has made nothing, and its settings may be put right
        save_config(self.config, self.folder / "config.yaml")
        self.tracker = start_tracker(self.config, self.folder)
        status = "failed"
        watchers = [threading.Thread(target=self._show, name="progress", daemon=True)]
        try:
            self.tracker.plan.remote(self.rounds, self.rounds * self.config.copilot.steps_per_round)
            watchers.append(threading.Thread(target=self._watch_log, name="log-watch", daemon=True))
            for watcher in watchers:
                watcher.start()
            with resumable(
                self.folder
            ):  # this line and the status first: whoever stops a run may kill it within seconds
                result = self._phases()
            status = "done"
            return result
        except KeyboardInterrupt:
            status = "stopped"
            raise
        except Exception:
            self._check_lease()  # whatever a part has died of: that the log is another's now is what to say
            raise
        finally:
            self.stop_watching.set()
            self._finish(status)
            if status == "stopped":
                end_within(END_SECONDS)
            if self.group is not None:
                self.group.stop()
            for watcher in watchers:
                if watcher.is_alive():
                    watcher.join(10)

    def _check_lease(self) -> None:
        """Raises LeaseLostError when another process has taken the log over: this run has no part in it any more."""
        if self.lease is not None:
            self.lease.check()

    def _prepare(self) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from tc_ray.data.prepared.batches import RoundOrder
        from tc_ray.models.families import family_of
        from tc_ray.models.hub import embedding_rows, resolve_model
        from tc_ray.models.pilot.load import check_folders
        from tc_ray.pilot.log_metadata import check_log
        from tc_ray.run.inputs import base_weights, check_inputs, prepare_rows, recorded_inputs

        model = self.config.model
        self.pilot_path = resolve_model(model.pilot, model.cache)
        self.base_path = resolve_model(model.copilot, model.cache) if model.copilot else self.pilot_path
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.pilot_path, trust_remote_code=False)
            self.shape = AutoConfig.from_pretrained(self.pilot_path, trust_remote_code=False)
        except ValueError as error:
            said = str(error).strip().split("\n")[0]
            raise JobError(
                f"model.pilot {model.pilot} cannot be read (code in a model folder is never run): {said}"
            ) from error
        encoder_decoder = family_of(self.shape).encoder_decoder
        try:
            check_folders(self.config, self.pilot_path, self.base_path)
        except (ValueError, OSError) as error:
            raise JobError(str(error)) from None
        if self.config.log.enabled:
            try:
                check_log(self.config, self.shape)
            except ValueError as error:
                raise JobError(str(error)) from None
        recorded = recorded_inputs(self.config, self.folder, self.log)
        weights = base_weights(self.config, self.pilot_path, self.base_path)
        check_inputs(self.config, recorded, weights)
        self.data, rows = prepare_rows(
            self.config,
            self.tokenizer,
            recorded,
            encoder_decoder=encoder_decoder,
            vocab_size=embedding_rows(self.pilot_path, self.shape),
        )
        self.inputs = rows | weights
        for line in self.data.describe():
            print(visible(line), flush=True)
        pilot = self.config.pilot
        self.data.check_rounds(pilot.batch_size)
        if self.config.log.enabled and not self.data.rows["test"]:
            raise JobError("no test rows to measure with: set data.test or a data.test_size above 0")
        order = RoundOrder(self.data.rows["train"], pilot.batch_size, pilot.epochs, self.config.run.seed)
        self.rounds = min(order.rounds, pilot.max_rounds or order.rounds)
        print(
            visible(
                f"run {self.config.run.name} in {self.folder}: {self.rounds} rounds of {pilot.batch_size} examples, "
                f"{self.config.copilot.steps_per_round} Copilot steps a round"
            ),
            flush=True,
        )

    def _open_log(self) -> None:
        """Make or open the table, take its lease, and start its Ledger."""
        if not self.config.log.enabled:
            return
        from tc_ray.mistakelog.commit.ledger_actor import start_ledger
        from tc_ray.mistakelog.maintain.limits import Upkeep
        from tc_ray.mistakelog.table.store import LogStore
        from tc_ray.pilot.log_metadata import log_metadata

        metadata = log_metadata(self.config, self.shape, self.tokenizer, self.inputs)
        LogStore.create(self.log, metadata)
        if self.lease is None:
            self.lease = RunLease.take(self.log, f"run {self.config.run.name}")
        self.ledger = start_ledger(
            self.log,
            metadata,
            writers=self.config.resources.pilot_workers,
            run=self.config.run.name,
            lease=self.lease.number,
            upkeep=Upkeep.from_config(self.config.log, self._rounds_read_again()),
        )

    def _rounds_read_again(self) -> int:
        """Rounds behind the Copilot's position that a restarted one reads."""
        # with max_seen how far the buffer reaches back depends on the records
        return self.config.copilot.buffer_rounds if self.config.copilot.max_seen is None else self.rounds

    def _phases(self) -> JobResult:
        self.tracker.phase.remote("train")
        self._train()
        if not self.config.log.enabled:
            return JobResult(self.folder, None, None, self._mlflow_command())
        self._check_lease()
        self.tracker.phase.remote("evaluate")
        report = self._evaluate()
        self._check_lease()
        self.tracker.phase.remote("export")
        export = self._export(report)
        result = JobResult(self.folder, export, report, self._mlflow_command())
        if self.no_copilot is not None:
            raise NoCopilotError(self.no_copilot, result)
        return result

    def _train(self) -> None:
        """Pilot and Copilot side by side. The Copilot's room is reserved first: Ray Train takes what it needs after.

        A Copilot that fails for good leaves `no_copilot`, the reason, and the Pilot's result.
        """
        from tc_ray.copilot.group import CopilotError
        from tc_ray.pilot.loop import PilotJob
        from tc_ray.pilot.trainer import fit_pilot

        self._start_copilot()
        if not self._pilot_is_done():
            job = PilotJob(
                self.config, self.pilot_path, self.data.train, self.rounds, self.ledger, self.tracker, self.inputs
            )
            fit_pilot(job, pilot_need(self.config))
        if self.group is None:
            return
        self.tracker.phase.remote("catch-up")
        try:
            self.group.wait()
        except CopilotError as error:
            self._check_lease()
            self.no_copilot = str(error)
        self.group.stop()  # the evaluation takes its room

    def _pilot_is_done(self) -> bool:
        import ray

        if not is_whole(self.folder / "pilot" / "final"):
            return False
        return self.ledger is None or ray.get(self.ledger.state.remote()).pilot_done

    def _start_copilot(self) -> None:
        """Leaves `group`, where there is a Copilot still to be trained."""
        need = copilot_need(self.config)
        if need is None:
            return
        if is_whole(self.folder / "copilot" / "final"):  # done in an earlier start
            self.ledger.report_copilot.remote(self.rounds, self.rounds * self.config.copilot.steps_per_round)
            return
        from tc_ray.copilot.group import CopilotGroup
        from tc_ray.copilot.worker import CopilotJob

        self.group = CopilotGroup(
            CopilotJob(
                self.config, self.pilot_path, self.base_path, self.rounds, self.ledger, self.tracker, self.inputs
            ),
            need,
        )
        self.group.start()

    def _evaluate(self) -> Any:
        """In a task of its own, with the CPUs (and GPU) that training has given back."""
        from tc_ray.run.evaluate import launch_evaluation

        size = logged_error_size(self.log)
        report = launch_evaluation(
            self.config, self.data.source, self.tracker, seen_error_size=size, no_copilot=self.no_copilot
        )
        report.save(self.folder)
        self.tracker.evaluation.remote(report.to_dict(), report.markdown())
        return report

    def _export(self, report: Any) -> Path:
        from tc_ray.export.write import export_fused

        export = export_fused(self.config, report, rounds=self.rounds)
        if self.config.tracking.log_model:
            self.tracker.artifact.remote(export, "export")
        return export

    def _finish(self, status: str) -> None:
        import ray

        ray.get(self.tracker.finish.remote(status))

    def _mlflow_command(self) -> str | None:
        if not self.config.tracking.enabled:
            return None
        from tc_ray.tracking.mlflow_writer import mlflow_command, resolve_uri

        return mlflow_command(resolve_uri(self.config))

    def _watch_log(self) -> None:
        """Once a second, tell the tracker how far the log and the Copilot are; now and then, have the Ledger free space.

        It then looks at the table too: one that finds the lease lost lets Pilot and Copilot go on no more.
        """
        import ray

        tended = time.monotonic()
        while self.ledger is not None and not self.stop_watching.wait(LOG_POLL_SECONDS):
            if time.monotonic() > tended + TEND_SECONDS or (self.lease is not None and self.lease.lost):
                self.ledger.tend.remote()
                tended = time.monotonic()
            try:
                state = ray.get(self.ledger.state.remote())
            except LeaseLostError:
                return
            if self.group is not None:
                self.group.release_pilot()
            self.tracker.log.remote(
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

    def _show(self) -> None:
        import ray

        from tc_ray.tracking.progress import ProgressView

        def status() -> Any:
            try:
                return ray.get(self.tracker.status.remote())
            except ray.exceptions.RayActorError:
                return None  # lost with its node: it comes back elsewhere

        ProgressView().follow(status, self.stop_watching)


def logged_error_size(log: Location) -> float | None:
    """Mean squared error a target token (sum over V of l^2) in the last rounds of the log; None: they hold no such token."""
    from tc_ray.mistakelog.read.reader import MistakeLog

    with MistakeLog(log) as mistakes:
        last = max((file.round_max for file in mistakes.files), default=1)
        rounds = (max(1, last - ERROR_SIZE_ROUNDS + 1), last)
        table = mistakes.arrow(rounds, columns=["error_values", "error_rest"])
    errors = table["error_values"].combine_chunks().flatten().to_numpy()
    tokens = len(table["error_rest"].combine_chunks().flatten())
    errors = errors[np.isfinite(errors)]  # rows of another writer may hold others
    return float(np.square(errors, dtype=np.float64).sum() / tokens) if tokens else None
