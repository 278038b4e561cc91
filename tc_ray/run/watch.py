"""Two threads of the driver while phases work: one shows the run's progress, one looks at its log.

Invariant: they only read, report and ask the Ledger for maintenance; no phase waits for them. Used by `run.job`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from tc_ray.mistakelog.table.errors import LeaseLostError
from tc_ray.run.state import Run

LOG_POLL_SECONDS = 1.0
MAINTENANCE_SECONDS = 5.0


class Watchers:
    """Both threads, from `start` to `stop` and `join`."""

    def __init__(self, run: Run) -> None:
        self._run, self._end = run, threading.Event()
        works = {"progress": self._show, "log-watch": self._watch_log}
        self._threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in works.items()]

    def start(self) -> None:
        """Start them; they have nothing to do until the run has its Tracker."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask both to end; progress is shown once more."""
        self._end.set()

    def join(self) -> None:
        """Wait for their end, at most 10 s each."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(10)

    def _watch_log(self) -> None:
        """Once a second, report the log's size and the Copilot's lag to the Tracker; sometimes ask for maintenance.

        Maintenance also reads the table, so a lost lease is found there and neither Pilot nor Copilot goes on.
        """
        import ray

        run, maintained = self._run, time.monotonic()
        while not self._end.wait(LOG_POLL_SECONDS):
            if run.ledger is None or run.tracker is None:
                continue
            if time.monotonic() > maintained + MAINTENANCE_SECONDS or (run.lease is not None and run.lease.lost):
                run.ledger.maintain_soon.remote()
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

    def _show(self) -> None:
        import ray

        from tc_ray.tracking.progress import ProgressView

        def status() -> Any:
            if self._run.tracker is None:
                return None
            try:
                return ray.get(self._run.tracker.status.remote())
            except ray.exceptions.RayActorError:
                return None  # lost with its node: it is restarted on another

        ProgressView().follow(status, self._end)
