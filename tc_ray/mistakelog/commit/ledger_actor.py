"""The Ledger as a Ray actor: started once by the job, restarted by Ray as often as it dies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.limits import Upkeep
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.errors import LeaseLostError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.retry import patiently
from tc_ray.mistakelog.table.store import LogStore

log = logging.getLogger(__name__)


class LedgerActor(Ledger):
    """A Ledger that starts in any case: callers of an actor whose start fails learn nothing but that it died.

    Restarted while the log cannot be reached, it waits; restarted after the lease was lost, it says so to every call.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            patiently(lambda: Ledger.__init__(self, *args, **options), "Ledger")
        except LeaseLostError as error:
            log.warning("%s", error)


def start_ledger(
    location: str | Path | Location,
    metadata: LogMetadata,
    *,
    writers: int,
    run: str,
    lease: int | None = None,
    upkeep: Upkeep | None = None,
) -> Any:
    """Start the Ledger of an existing table as a Ray actor that restarts by itself.

    The actor lives as long as a handle to it does in the starting process.

    Returns:
        The actor handle.

    Raises:
        LedgerError: see `Ledger`.
    """
    import ray

    place = Location(location)
    # made here too, so that a bad location is reported to the caller at once and the restarted actor only opens
    LogStore.create(place, metadata)
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)(LedgerActor)
    handle = actor.remote(place, writers=writers, run=run, lease=lease, upkeep=upkeep)
    ray.get(handle.state.remote())
    return handle


def submit_to(handle: Any) -> Callable[[DataFile], int]:
    """`submit` of a `RecordWriter` for a Ledger actor.

    Ray repeats a call whose actor died until the restarted one answers; `commit` recognises the repetition.
    """
    import ray

    def submit(file: DataFile) -> int:
        try:
            return int(ray.get(handle.commit.remote(file)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    return submit
