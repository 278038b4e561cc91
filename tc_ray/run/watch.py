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

    from tc_ray.tracking.statusfile import ProgressView

    def status() -> Any:
        if run.tracker is None:
            return None
        try:
            return ray.get(run.tracker.status.remote())
        except ray.exceptions.RayActorError:
            return None  # lost with its node: it is restarted on another

    ProgressView().follow(status, end)
