"""The Delta table under the Mistake Log: create, open, commit finished files, list them at a version.

Invariant: a commit is one Delta transaction, so its added files, its removed files and its numbers (application
transactions) become visible together or not at all; when `commit` returns, it is on the disk and not in a cache only
(delta-rs leaves that to the system). Only the holder of the run's lease commits; readers only take snapshots.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from tc_ray.files import sync
from tc_ray.mistakelog.commits import LOG_FOLDER, Commit, CommitLog, Fate, commit_name
from tc_ray.mistakelog.datafile import Committed, DataFile, read_file, read_pieces
from tc_ray.mistakelog.location import Location
from tc_ray.mistakelog.repair import repair
from tc_ray.mistakelog.schema import PREFIX, ROW_SCHEMA, LogMetadata, LogSchemaError

_CHECKPOINT_COMMITS = 100
_SPACE_ERRORS = ("os error 28", "os error 122")
# the commit files hold the checksums: they stay as long as the table does
_TABLE_SETTINGS = {"delta.logRetentionDuration": "interval 36500 days"}


log = logging.getLogger(__name__)


class CommitConflictError(RuntimeError):
    """Another committer changed the table since this store last read it: `refresh`, decide anew, try again."""


class LogFullError(OSError):
    """There is no space left where the log is. Nothing was changed; the same call may succeed later."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return LogFullError, (self.strerror,)


@dataclass(frozen=True)
class StoredFile:
    """A data file of a snapshot, with the statistics and checksums of its commit."""

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
    sha256: str | None = None
    """None: not in the commits that are left."""
    crc32: int | None = None

    @property
    def committed(self) -> Committed:
        """What its bytes are checked against."""
        return Committed(self.bytes, self.crc32, self.sha256, self.rows)


class LogStore:
    """A Mistake Log's Delta table.

    Args:
        location: of the table.
        version: pin this version; default: the latest, moved on by `refresh` and `commit`.
        storage_options: of an object store.

    Raises:
        LogSchemaError: no Delta table there, or not a Mistake Log of a known schema version.
    """

    def __init__(
        self,
        location: str | Path | Location,
        version: int | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        self.location = Location(location, storage_options)
        if not is_table(self.location):
            raise LogSchemaError(f"{self.location}: no Mistake Log here (no Delta table)")
        self._table = DeltaTable(self.location.uri, version=version, storage_options=self.location.options)
        self._commits = CommitLog(self.location)
        self._durable = self._metadata_version = self._table.version()
        self._metadata = self._read_metadata()

    @classmethod
    def create(
        cls,
        location: str | Path | Location,
        metadata: LogMetadata,
        storage_options: Mapping[str, str] | None = None,
    ) -> LogStore:
        """Open the table, made first if it is not there.

        Raises:
            LogSchemaError: the table there was made with other metadata; the message lists the differences.
        """
        place = Location(location, storage_options)
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
            _make_durable(place, [commit_name(0)])
        store = cls(place)
        differences = metadata.differences(store.metadata)
        if differences:
            raise LogSchemaError(
                f"{place}: this run cannot go on in this log, its metadata differs ({'; '.join(differences)}); "
                "choose another run folder or restore the old settings"
            )
        return store

    def _read_metadata(self) -> LogMetadata:
        return LogMetadata.from_configuration(self._table.metadata().configuration, str(self.location))

    @property
    def metadata(self) -> LogMetadata:
        """What holds for every row, at this version."""
        if self._metadata_version != self._table.version():
            self._metadata, self._metadata_version = self._read_metadata(), self._table.version()
        return self._metadata

    @property
    def version(self) -> int:
        """Table version this store stands at."""
        return int(self._table.version())

    def refresh(self, version: int | None = None) -> None:
        """Move to the latest version, or to `version`."""
        if version is None:
            self._table.update_incremental()
        elif version != self._table.version():
            self._table.load_as_version(version)

    def settle(self) -> None:
        """Bring the commits up to this version to the disk: before anything of what they say is acknowledged.

        For one who commits, and has called `repair` before this store was opened.

        Raises:
            LogFullError: no space (some systems find that out only now).
        """
        if self.version > self._durable:
            with full_disk_named(self.location):
                _make_durable(self.location, [commit_name(one) for one in range(self._durable + 1, self.version + 1)])
            self._durable = self.version

    def number(self, name: str) -> int | None:
        """The number last committed under `name` (an application transaction), or None."""
        return self._table.transaction_version(name)

    def commits(self) -> list[Commit]:
        """All commits up to this version, oldest first, read anew: for what is asked seldom."""
        return self._commits.commits(self.version)

    def fates(self) -> dict[str, Fate]:
        """Checksums, and the time of removal, of every file that was ever committed up to this version; see `forget`."""
        return self._commits.fates(self.version)

    def forget(self, names: Iterable[str]) -> None:
        """Files that are no longer there: nothing need be known of them."""
        self._commits.forget(names)

    def files(self) -> list[StoredFile]:
        """Data files at this version, by round, then name.

        Raises:
            LogSchemaError: a file was committed without the statistics that the log relies on.
        """
        return self._files_of(self._table)

    def files_at(self, version: int) -> list[StoredFile]:
        """Data files at another version; this store stays where it is."""
        if version == self.version:
            return self.files()
        return self._files_of(DeltaTable(self.location.uri, version=version, storage_options=self.location.options))

    def _files_of(self, table: DeltaTable) -> list[StoredFile]:
        fates = self._commits.fates(int(table.version()))
        files = []
        for row in pa.table(table.get_add_actions(flatten=True)).to_pylist():
            fate = fates.get(row["path"], Fate(None, None, None))
            found = StoredFile(
                name=row["path"],
                rows=row["num_records"],
                bytes=row["size_bytes"],
                run=row.get("min.run"),
                round_min=row.get("min.round"),
                round_max=row.get("max.round"),
                rank=row.get("min.rank"),
                attempt=row.get("min.attempt"),
                sha256=fate.sha256,
                crc32=fate.crc32,
            )
            missing = [key for key, value in asdict(found).items() if value is None and key not in ("sha256", "crc32")]
            if missing:
                raise LogSchemaError(
                    f"{self.location}/{found.name}: committed without statistics of {', '.join(missing)}: "
                    "not by tc-ray; `DELETE` or `restore` it away with any Delta tool"
                )
            files.append(found)
        return sorted(files, key=lambda file: (file.round_min, file.name))

    def read(self, file: StoredFile, columns: list[str] | None = None) -> pa.Table:
        """Rows of a file, checked before they are parsed; see `read_file`."""
        return read_file(self.location, file.name, columns, file.committed)

    def read_pieces(self, file: StoredFile, rows: int) -> Iterator[pa.Table]:
        """Rows of a file, some at a time, all checked before the first is parsed; see `datafile.read_pieces`."""
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
        """Add and remove files and set numbers, all in one table version.

        Every commit of a run should set one same number, so that a second committer is noticed.

        Args:
            covered: statements without a file (rounds without rows), kept in the commit for their drop counts.
            note: kept with the commit: JSON values.
            data_change: False: the same rows in other files (compaction).

        Returns:
            The new table version.

        Raises:
            CommitConflictError: another committer set one of `numbers` since this store last read the table.
            LogFullError: no space for the commit; nothing was changed.
            ValueError: a file to add is not there, or has another size than stated.
        """
        now_ms = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [self._add_action(file, now_ms, data_change) for file in add]
        actions += [
            RemoveAction(file.name, data_change, now_ms, size=file.bytes, partition_values={}) for file in remove
        ]
        told = {"files": [asdict(file) for file in (*add, *covered)]}
        properties = CommitProperties(
            custom_metadata={"tc_ray": told | dict(note or {})},
            app_transactions=[Transaction(name, value) for name, value in numbers.items()],
        )
        self._change(
            lambda: self._table.create_write_transaction(
                actions,
                mode="append",
                schema=self._table.schema(),
                commit_properties=properties,
                # made below, where it is brought to the disk too
                post_commithook_properties=PostCommitHookProperties(
                    create_checkpoint=False, cleanup_expired_logs=False
                ),
            )
        )
        if self.version % _CHECKPOINT_COMMITS == 0:
            self._checkpoint()
        return self.version

    def choose_top_k(self, top_k: int) -> None:
        """Set the number of errors a token in the table's configuration; see `LogMetadata.top_k`."""
        self._change(
            lambda: self._table.alter.set_table_properties(
                {f"{PREFIX}top_k": str(top_k)},
                raise_if_not_exists=False,
                post_commithook_properties=PostCommitHookProperties(
                    create_checkpoint=False, cleanup_expired_logs=False
                ),
            )
        )

    def _change(self, change: Callable[[], object]) -> None:
        try:
            with full_disk_named(self.location):
                change()
        except CommitFailedError as error:
            raise CommitConflictError(f"{self.location}: {error}") from error
        # the table object does not see its own transaction before this
        self._table.update_incremental()
        self.settle()

    def _checkpoint(self) -> None:
        """Sum the commits up in one Parquet file of Delta's own, so that opening the table stays quick."""
        try:
            with full_disk_named(self.location):
                self._table.create_checkpoint()
        except (
            OSError,
            DeltaError,
        ) as error:  # the commit itself stands; the next hundred will be summed up with these
            log.warning("%s: no checkpoint of the table at version %d: %s", self.location, self.version, error)
            return
        _make_durable(
            self.location, [f"{LOG_FOLDER}/{self.version:020d}.checkpoint.parquet", f"{LOG_FOLDER}/_last_checkpoint"]
        )

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
        # a file that stands in for others holds several ranks and attempts, of which the lowest are known
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


def is_table(location: Location) -> bool:
    """There is a Delta table at the location."""
    return DeltaTable.is_deltatable(location.uri, storage_options=location.options)


@contextmanager
def full_disk_named(location: Location) -> Iterator[None]:
    """Turns delta-rs' nameless OSError of a full disk into `LogFullError`."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise LogFullError(f"no space left at {location}") from error
        raise


def is_full_disk(error: OSError) -> bool:
    """The disk, or a quota on it, is full; delta-rs says so in the text only."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in _SPACE_ERRORS)


def _make_durable(location: Location, names: list[str]) -> None:
    """Bring files that delta-rs has written to the disk, and their names; an object store has done so already."""
    if location.local is None:
        return
    for name in names:
        if (path := location.local / name).exists():
            sync(path)
    sync(location.local / LOG_FOLDER)
