"""Opening the Delta table of a log, also one that a power cut has left with a torn checkpoint.

Invariant: what only sums commits up never keeps anybody from reading. Called by the store and by who must know whether there is a log.
"""

from __future__ import annotations

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import repair_checkpoints, torn_commits


def is_table(location: Location) -> bool:
    """There is a Delta table at the location."""
    return DeltaTable.is_deltatable(location.uri, storage_options=location.options)


def open_table(location: Location, version: int | None = None) -> DeltaTable:
    """The table at a version. What a power cut has left of a checkpoint is moved aside: it only sums commits up.

    Raises:
        LogSchemaError: the newest commit is torn, which only the holder of the lease may put right.
    """

    def opened() -> DeltaTable:
        return DeltaTable(location.uri, version=version, storage_options=location.options)

    try:
        return opened()
    except DeltaError:
        if repair_checkpoints(location):
            return opened()
        for path in torn_commits(location):
            raise LogSchemaError(
                f"{path}: torn, as a power cut leaves a commit that was never acknowledged; the next start of the run, or "
                "`tc-ray log compact`, moves it aside"
            ) from None
        raise
