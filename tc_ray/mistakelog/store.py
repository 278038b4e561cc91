"""The Delta table under the Mistake Log: create, open, commit finished files, list them at a version.

Invariant: a commit is one Delta transaction, so its added files, its removed files and its numbers (application
transactions) become visible together or not at all. Only the Ledger commits; readers only take snapshots.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from tc_ray.mistakelog.datafile import DataFile, ParquetPart, read_file
from tc_ray.mistakelog.schema import ROW_SCHEMA, LogMetadata, LogSchemaError


class CommitConflictError(RuntimeError):
    """Another committer changed the table since this store last read it: `refresh`, decide anew, try again."""


@dataclass(frozen=True)
class StoredFile:
    """A data file of a snapshot, with the statistics of its commit."""

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


class LogStore:
    """A Mistake Log's Delta table.

    Args:
        path: folder of the table.
        version: pin this version; default: the latest, moved on by `refresh` and `commit`.

    Raises:
        LogSchemaError: no Delta table there, or not a Mistake Log of a known schema version.
    """

    def __init__(self, path: str | Path, version: int | None = None) -> None:
        self.path = Path(path).absolute()
        if not DeltaTable.is_deltatable(str(self.path)):
            raise LogSchemaError(f"{self.path}: no Delta table here")
        self._table = DeltaTable(str(self.path), version=version)
        self.metadata = LogMetadata.from_configuration(self._table.metadata().configuration, str(self.path))

    @classmethod
    def create(cls, path: str | Path, metadata: LogMetadata) -> LogStore:
        """Open the table, made first if it is not there.

        Raises:
            LogSchemaError: the table there was made with other metadata; the message lists the differences.
        """
        folder = Path(path).absolute()
        if not DeltaTable.is_deltatable(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            DeltaTable.create(
                str(folder),
                schema=ROW_SCHEMA,
                name="mistake-log",
                configuration=metadata.to_configuration(),
                raise_if_key_not_exists=False,
            )
        store = cls(folder)
        differences = metadata.differences(store.metadata)
        if differences:
            raise LogSchemaError(
                f"{folder}: this run cannot go on in this log, its metadata differs ({'; '.join(differences)}); "
                "choose another run folder or restore the old settings"
            )
        return store

    @property
    def version(self) -> int:
        """Table version this store stands at."""
        return self._table.version()

    def refresh(self, version: int | None = None) -> None:
        """Move to the latest version, or to `version`."""
        if version is None:
            self._table.update_incremental()
        elif version != self._table.version():
            self._table.load_as_version(version)

    def number(self, name: str) -> int | None:
        """The number last committed under `name` (an application transaction), or None."""
        return self._table.transaction_version(name)

    def files(self) -> list[StoredFile]:
        """Data files at this version, by round, then name.

        Raises:
            LogSchemaError: a file was committed without the statistics that the log relies on.
        """
        files = []
        for row in pa.table(self._table.get_add_actions(flatten=True)).to_pylist():
            found = StoredFile(
                name=row["path"],
                rows=row["num_records"],
                bytes=row["size_bytes"],
                run=row.get("min.run"),
                round_min=row.get("min.round"),
                round_max=row.get("max.round"),
                rank=row.get("min.rank"),
                attempt=row.get("min.attempt"),
            )
            missing = [key for key, value in asdict(found).items() if value is None]
            if missing:
                raise LogSchemaError(f"{self.path / found.name}: committed without statistics of {', '.join(missing)}")
            files.append(found)
        return sorted(files, key=lambda file: (file.round_min, file.name))

    def commit(
        self, *, add: Sequence[DataFile] = (), remove: Sequence[StoredFile] = (), numbers: Mapping[str, int]
    ) -> int:
        """Add and remove files and set numbers, all in one table version.

        Every commit of a run should set one same number, so that a second committer is noticed.

        Returns:
            The new table version.

        Raises:
            CommitConflictError: another committer set one of `numbers` since this store last read the table.
            ValueError: a file to add is not there, or has another size than stated.
        """
        now_ms = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [self._add_action(file, now_ms) for file in add]
        actions += [RemoveAction(file.name, True, now_ms, size=file.bytes, partition_values={}) for file in remove]
        properties = CommitProperties(
            custom_metadata={"tc_ray": {"files": [asdict(file) for file in add]}},
            app_transactions=[Transaction(name, value) for name, value in numbers.items()],
        )
        try:
            self._table.create_write_transaction(
                actions, mode="append", schema=self._table.schema(), commit_properties=properties
            )
        except CommitFailedError as error:
            raise CommitConflictError(f"{self.path}: {error}") from error
        # the table object does not see its own transaction before this
        self._table.update_incremental()
        return self._table.version()

    def _add_action(self, file: DataFile, now_ms: int) -> AddAction:
        if file.name is None:
            raise ValueError(f"nothing to add: {file.key} covers rounds without rows")
        path = self.path / file.name
        size = path.stat().st_size if path.exists() else None
        if size != file.bytes:
            raise ValueError(f"{path}: {'missing' if size is None else f'{size} bytes'}, expected {file.bytes} bytes")
        shared = {"run": self.metadata.run, "attempt": file.attempt, "rank": file.rank}
        stats: dict[str, Any] = {
            "numRecords": file.rows,
            "minValues": {**shared, "round": file.round_min},
            "maxValues": {**shared, "round": file.round_max},
            "nullCount": {"run": 0, "attempt": 0, "rank": 0, "round": 0},
        }
        return AddAction(
            path=file.name,
            size=file.bytes,
            partition_values={},
            modification_time=now_ms,
            data_change=True,
            stats=json.dumps(stats),
        )

    def trimmed(self, file: StoredFile, watermark: int, attempt: int) -> DataFile:
        """Write a copy of `file` without the rounds after `watermark`, to be committed in its place.

        Args:
            attempt: the attempt that fences; it makes the new name unique.
        """
        rows = read_file(self.path / file.name)
        rows = rows.filter(pc.field("round") <= watermark)
        part = ParquetPart(self.path, f"{file.name}.trim.tmp", "none", self.metadata.to_configuration())
        part.write(rows)
        name = f"{file.name.removesuffix('.parquet')}-cut{watermark}-a{attempt}.parquet"
        size, sha256 = part.finish(name)
        return DataFile(name, rows.num_rows, size, file.round_min, watermark, file.rank, file.attempt, -1, sha256)
