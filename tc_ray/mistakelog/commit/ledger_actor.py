"""The Ledger as a Ray actor: started once by the job, restarted by Ray as often as it dies.

Maintenance runs in a thread of the actor's process, woken by commits, so neither commits nor `state` wait for a merge. The thread
needs no shutdown: `finish_pilot` waits for the last maintenance, and killing it at any moment is a crash of the Ledger.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tc_ray.cluster.measure import peak_memory
from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger, LogState
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.errors import LeaseLostError, retry
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore

log = logging.getLogger(__name__)


class LedgerActor(Ledger):
    """A Ledger with a maintenance thread, whose start never fails: callers of an actor that fails to start learn nothing else.

    Restarted while the log cannot be reached, it waits. Restarted after the lease was lost, every call raises LeaseLostError.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._due = threading.Event()
        try:
            retry(lambda: Ledger.__init__(self, *args, **options), "Ledger")
        except LeaseLostError as error:
            log.warning("%s", error)
            return
        threading.Thread(target=self._work, name="log-maintenance", daemon=True).start()

    def commit(self, file: DataFile) -> int:
        """As `Ledger.commit`; maintenance follows in its thread, also after a failure, which may be a full disk."""
        try:
            return super().commit(file)
        finally:
            self._due.set()

    def maintain_soon(self) -> None:
        """Wake the maintenance thread, which also checks that the lease is still held."""
        self._due.set()

    def _work(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            try:
                self.maintain()
            except LeaseLostError as error:
                log.warning("%s", error)
                return
            except Exception:
                log.exception("maintenance failed; it is tried again after the next commit")


def start_ledger(
    location: str | Path | Location,
    metadata: LogMetadata,
    *,
    writers: int,
    run: str,
    lease: int | None = None,
    settings: LogSection | None = None,
    buffer_rounds: int = 1,
) -> Any:
    """Start the Ledger of an existing table as a Ray actor that restarts by itself and lives as long as the returned handle.

    Arguments and errors: see `Ledger`.
    """
    import ray

    class RayLedger(LedgerActor):
        @ray.method(concurrency_group="state")  # a thread of its own: answered during a commit
        def state(self) -> LogState:
            return super().state()

        @ray.method(concurrency_group="state")
        def peak_memory(self) -> dict[str, float]:
            """Of the actor's process."""
            return peak_memory("ledger")

    place = Location(location)
    # made here too, so that a bad location is reported to the caller at once and the restarted actor only opens
    LogStore.create(place, metadata)
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0, concurrency_groups={"state": 1})(RayLedger)
    handle = actor.remote(place, writers=writers, run=run, lease=lease, settings=settings, buffer_rounds=buffer_rounds)
    ray.get(handle.state.remote())
    return handle


def submit_to(handle: Any) -> Callable[[DataFile], int]:
    """`submit` of a `RecordWriter`. Ray repeats a call whose actor died until the restarted one answers."""
    import ray

    def submit(file: DataFile) -> int:
        try:
            return int(ray.get(handle.commit.remote(file)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    return submit
