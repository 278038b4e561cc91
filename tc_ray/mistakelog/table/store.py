"""The Delta table under the Mistake Log: create, open, commit finished files, list them at a version.

Invariants: a commit is one Delta transaction, so its added files, its removed files and its numbers (application transactions)
become visible together or not at all. When `commit` returns, it is on the disk. A commit is the version right after the one that
the committer has read, or it fails (delta-rs by default moves it behind the commits of others). So what was checked at the version
read, the lease above all, holds for the commit. Only the holder of the run's lease commits.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from tc_ray.files import sync
from tc_ray.mistakelog.rows.schema import ROW_SCHEMA, LogMetadata, LogSchemaError
from tc_ray.mistakelog.table.commits import Commit, CommitLog, Fate, commit_name
from tc_ray.mistakelog.table.data_file import Committed, DataFile, read_file, read_pieces
from tc_ray.mistakelog.table.errors import CommitConflictError, LeaseLostError, full_disk_named
from tc_ray.mistakelog.table.location import Location, check_data_name
from tc_ray.mistakelog.table.repair import NEWEST, is_table, open_table, renew_commits, repair, write_checkpoint

LEASE_NUMBER = "tc_ray/lease"
"""Name of the number that identifies the lease; see `lease.RunLease`."""
_CHECKPOINT_COMMITS = 100
# the commit files hold the CRC-32s: they stay as long as the table does
_TABLE_SETTINGS = {"delta.logRetentionDuration": "interval 36500 days"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A data file of a snapshot, with the statistics and the CRC-32 of its commit."""

    name: str
    rows: int
    bytes: int
    run: str
    round_min: int
    round_max: int
    rank: int
    """Lowest rank in it; files of the record writer hold one."""
    attempt: int
    """Lowest attempt in it; files of the record writer hold one."""
    crc32: int

    @property
    def committed(self) -> Committed:
        """What its content is checked against."""
        return Committed(self.bytes, self.crc32, self.rows)


class LogStore:
    """A Mistake Log's Delta table.

    Args:
        version: pin this version; default: the newest, moved on by `refresh` and `commit`.
        lease: number of the run's lease, for its holder: every commit carries it, and none is made if the table has another.
            None: nobody else is at work on the log, or nothing is committed.

    Raises LogSchemaError: no Delta table there, or not a Mistake Log of this schema version.
    """

    def __init__(
        self,
        location: str | Path | Location,
        version: int | None = None,
        *,
        lease: int | None = None,
    ) -> None:
        self.location = Location(location)
        if not is_table(self.location):
            raise LogSchemaError(f"{self.location}: no Mistake Log here (no Delta table)")
        self._table = open_table(self.location, version)
        self._lease, self._lease_lost = lease, False
        self._commits = CommitLog(self.location)
        self.durable = int(self._table.version())
        """Last version that is known to be on the disk; see `settle`."""
        self.metadata = LogMetadata.from_configuration(self._table.metadata().configuration, str(self.location))
        """What holds for every row; it never changes."""

    @classmethod
    def create(cls, location: str | Path | Location, metadata: LogMetadata) -> LogStore:
        """Open the table, which is made first if it is not there.

        Raises LogSchemaError: the table there was made with other metadata; the message lists the differences.
        """
        place = Location(location)
        repair(place)  # a power cut while the table was made leaves an empty first commit
        if not is_table(place):
            place.make()
            with full_disk_named(place):
                DeltaTable.create(
                    place.uri,
                    schema=ROW_SCHEMA,
                    name="mistake-log",
                    configuration=metadata.to_configuration() | _TABLE_SETTINGS,
                    storage_options=place.options,
                    raise_if_key_not_exists=False,
                )
            renew_commits(place, [0])
            if place.local is not None:
                sync(place.local)
        store = cls(place)
        differences = metadata.differences(store.metadata)
        if differences:
            raise LogSchemaError(
                f"{place}: this run cannot continue this log, its metadata differs ({'; '.join(differences)}); "
                "choose another run folder or restore the old settings"
            )
        return store

    @property
    def version(self) -> int:
        """That this store is at."""
        return int(self._table.version())

    def refresh(self, version: int | None = None) -> None:
        """Move to the newest version, or to `version`.

        Raises LeaseLostError: that version has another lease than this store.
        """
        if version is None:
            self._table.update_incremental()
        elif version != self._table.version():
            self._table.load_as_version(version)
        self._look_at_lease()

    def is_newest(self) -> bool:
        """Nobody has committed since the version that this store is at."""
        return self.location.size(commit_name(self.version + 1)) is None

    def check_lease(self) -> None:
        """Raises LeaseLostError if an earlier call found the lease lost; reads nothing."""
        if self._lease_lost:
            raise LeaseLostError.of(self.location)

    def confirm(self) -> None:
        """Check, before something beside the table is changed, that this store is at the newest version and has the lease there.

        Raises CommitConflictError, LeaseLostError: another committer has changed the table since, or taken the lease.
        """
        self._look_at_lease()
        if not self.is_newest():
            raise self._overtaken(f"another process has committed since version {self.version}")

    def _look_at_lease(self) -> None:
        if self._lease is not None and self.number(LEASE_NUMBER) != self._lease:
            self._lease_lost = True  # for good, whatever a later version says
        self.check_lease()

    def _overtaken(self, how: str) -> Exception:
        """The error after another committer's commit; this store stays at its version."""
        if self._lease is not None and LogStore(self.location).number(LEASE_NUMBER) != self._lease:
            self._lease_lost = True
            return LeaseLostError.of(self.location)
        return CommitConflictError(f"{self.location}: {how}")

    def settle(self) -> None:
        """Bring the commits up to this version to the disk, before anything in them is acknowledged or built upon.

        For a committer that called `repair` before this store was opened. Raises OSError if the disk does not take them.
        """
        if self.version > self.durable:
            with full_disk_named(self.location):
                renew_commits(self.location, range(self.durable + 1, self.version + 1))
            self.durable = self.version

    def adopt(self) -> None:
        """As `settle`, for commits of others too: the process that made the newest may have died before they were on the disk."""
        self._look_at_lease()
        self.durable = min(self.durable, max(self.version - NEWEST, -1))
        self.settle()

    def number(self, name: str) -> int | None:
        """The number last committed under `name` (an application transaction), or None."""
        return self._table.transaction_version(name)

    def commits(self) -> list[Commit]:
        """Up to this version, oldest first, read anew."""
        return self._commits.commits(self.version)

    def fates(self) -> dict[str, Fate]:
        """CRC-32 and version of removal of every file committed up to this version."""
        return self._commits.fates(self.version)

    def files(self) -> list[StoredFile]:
        """Data files at this version, by round, then name.

        Raises:
            LogSchemaError: a file was not committed by tc-ray.
        """
        return self.files_at(self.version)

    def files_at(self, version: int) -> list[StoredFile]:
        """Data files at another version; this store stays at its own."""
        table = self._table if version == self.version else open_table(self.location, version)
        fates = self._commits.fates(version)
        files = []
        for row in pa.table(table.get_add_actions(flatten=True)).to_pylist():
            check_data_name(self.location, row["path"])
            fate = fates.get(row["path"])
            crc32: Any = None if fate is None else fate.crc32
            found = StoredFile(
                name=row["path"],
                rows=row["num_records"],
                bytes=row["size_bytes"],
                run=row.get("min.run"),
                round_min=row.get("min.round"),
                round_max=row.get("max.round"),
                rank=row.get("min.rank"),
                attempt=row.get("min.attempt"),
                crc32=crc32,
            )
            missing = [key for key, value in asdict(found).items() if value is None]
            if missing:
                raise LogSchemaError(
                    f"{self.location}/{found.name}: committed without {', '.join(missing)}: not by tc-ray; `restore` an "
                    "earlier version with any Delta tool"
                )
            files.append(found)
        return sorted(files, key=lambda file: (file.round_min, file.name))

    def read(self, file: StoredFile, columns: list[str] | None = None) -> pa.Table:
        """See `read_file`."""
        return read_file(self.location, file.name, file.committed, columns)

    def read_pieces(self, file: StoredFile, rows: int) -> Iterator[pa.Table]:
        """See `data_file.read_pieces`."""
        return read_pieces(self.location, file.name, file.committed, rows=rows)

    def commit(
        self,
        *,
        add: Sequence[DataFile] = (),
        remove: Sequence[StoredFile] = (),
        numbers: Mapping[str, int],
        covered: Sequence[DataFile] = (),
        note: Mapping[str, Any] | None = None,
        data_change: bool = True,
    ) -> int:
        """Add and remove files and set numbers, all in one table version, the one after `version`, which is returned.

        Args:
            covered: coverage without a file (rounds without rows), kept in the commit for its drop counts.
            note: JSON values, kept with the commit.
            data_change: False: the same rows in other files (compaction).

        Raises:
            CommitConflictError: another committer changed the table since this store last read it.
            LeaseLostError: the table has another lease than this store.
            LogFullError: no space for the commit; nothing was changed.
            ValueError: a file to add is not there, or has another size than stated.
        """
        now_ms = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [self._add_action(file, now_ms, data_change) for file in add]
        actions += [
            RemoveAction(file.name, data_change, now_ms, size=file.bytes, partition_values={}) for file in remove
        ]
        signed = dict(numbers) if self._lease is None else {**numbers, LEASE_NUMBER: self._lease}
        properties = CommitProperties(
            custom_metadata={"tc_ray": {"files": [asdict(file) for file in (*add, *covered)], **(note or {})}},
            app_transactions=[Transaction(name, value) for name, value in signed.items()],
            max_commit_retries=0,  # a retry would move the commit behind others that this store has not read
        )
        self._look_at_lease()
        self.settle()  # never more than one commit is not on the disk
        known = self.version
        try:
            with full_disk_named(self.location):
                self._table.create_write_transaction(
                    actions,
                    mode="append",
                    schema=self._table.schema(),
                    commit_properties=properties,
                    # the checkpoint is made below, and synced
                    post_commithook_properties=PostCommitHookProperties(
                        create_checkpoint=False, cleanup_expired_logs=False
                    ),
                )
        except CommitFailedError as error:
            raise self._overtaken(str(error)) from error
        # the table object does not see its own transaction before this
        self._table.update_incremental()
        self.settle()
        if self.version != known + 1:
            raise self._overtaken(f"another process has committed version {self.version}")
        if self.version % _CHECKPOINT_COMMITS == 0:
            try:
                write_checkpoint(self.location, self._table)
            except (OSError, DeltaError, ValueError) as error:
                # the commit itself is made; the next checkpoint summarises these commits too
                log.warning("%s: no checkpoint of the table at version %d: %s", self.location, self.version, error)
        return self.version

    def _add_action(self, file: DataFile, now_ms: int, data_change: bool) -> AddAction:
        if file.name is None:
            raise ValueError(f"nothing to add: {file.key} covers rounds without rows")
        size = self.location.size(file.name)
        if size != file.bytes:
            raise ValueError(
                f"{self.location}/{file.name}: {'missing' if size is None else f'{size} bytes'}, "
                f"expected {file.bytes} bytes"
            )
        lowest = {"run": self.metadata.run, "attempt": file.attempt, "rank": file.rank}
        # a file that replaces others holds several ranks and attempts, of which the lowest are known
        highest = lowest if file.sequence >= 0 else {"run": self.metadata.run}
        stats: dict[str, Any] = {
            "numRecords": file.rows,
            "minValues": {**lowest, "round": file.round_min},
            "maxValues": {**highest, "round": file.round_max},
            "nullCount": {"run": 0, "attempt": 0, "rank": 0, "round": 0},
        }
        return AddAction(
            path=file.name,
            size=file.bytes,
            partition_values={},
            modification_time=now_ms,
            data_change=data_change,
            stats=json.dumps(stats),
        )
