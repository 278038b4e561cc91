"""Readers of the Mistake Log: `LogTail` follows a growing log, `MistakeLog` reads one version of it.

Invariant: a reader follows the file list of one table version, so it never sees an unfinished, uncommitted or half-fenced file,
and what it returns for a version never changes. While it is open, a lease keeps the version's files from being removed. A file
that is not what was committed delivers no row: it is named, counted and skipped.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from tc_ray.mistakelog.read.read_ahead import read_ahead
from tc_ray.mistakelog.read.reader_lease import ReaderLease, held
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import ROW_SCHEMA
from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore, StoredFile

# read ahead: whole tables for slow consumers; pieces stay in the cache of the processor
_TABLES_AHEAD = 2
_PIECES_AHEAD = 2

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Update:
    """What changed in the log since the last poll."""

    new: list[tuple[str, Records]]
    """Added files by round, with their records."""
    removed: list[str]
    """Files that left the log (fenced or replaced): forget their records. May name skipped files."""
    version: int
    """Table version after this update."""
    bad: list[BadFileError] = field(default_factory=list)
    """Added files that are damaged; they are not tried again."""


class LogTail:
    """Reads each file of a growing log once. Arguments and errors: see `MistakeLog`."""

    def __init__(self, location: str | Path | Location, *, storage_options: Mapping[str, str] | None = None) -> None:
        self._store = LogStore(Location(location, storage_options))
        self._known: set[str] = set()
        self._lease = held(self._store)

    def poll(self, version: int | None = None, *, min_round: int = 0) -> Update:
        """Read what is new.

        Args:
            version: go to this version, also an older one; default: the newest.
            min_round: new files that end before this round are skipped, now and later.

        Raises OSError: the location cannot be read just now; the next poll tries again.
        """
        leased = self._lease.version
        self._store.refresh(version)
        if self._store.version != leased:
            # files of a version that nothing held may be gone by now: look again, with a lease on whatever may be found
            self._lease.move(self._store.version, onwards=True)
            self._store.refresh(version)
            self._lease.move(self._store.version)
        files = {file.name: file for file in self._store.files()}
        added = [file for name, file in files.items() if name not in self._known and file.round_max >= min_round]
        new: list[tuple[str, Records]] = []
        bad: list[BadFileError] = []
        for file in added:
            try:
                new.append((file.name, _records(self._store, file)))
            except BadFileError as error:
                log.warning("%s: %s: skipped, %d rows", self._store.location, error, file.rows)
                bad.append(error)
        removed = sorted(self._known - files.keys())
        self._known = set(files)
        return Update(new, removed, self._store.version, bad)

    def close(self) -> None:
        """Release the lease."""
        self._lease.release()


class MistakeLog:
    """One version of a log, held until `close` (or as long as the object lives).

    Args:
        location: folder or URI of the table.
        version: default: the newest.
        storage_options: of an object store, as delta-rs names them; the environment serves too.

    Raises LogSchemaError: no Mistake Log there, or another schema version.
    """

    def __init__(
        self,
        location: str | Path | Location,
        version: int | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        self._store = LogStore(Location(location, storage_options), version)
        self._lease = held(self._store, version)
        self.location, self.metadata, self.version = self._store.location, self._store.metadata, self._store.version
        self.files = self._store.files()
        """By round."""
        self.bad_files: list[BadFileError] = []
        """Files found damaged so far: this object returned none of their rows."""
        self.not_finite: dict[str, int] = {}
        """Rows with a NaN or an infinity that inspection has skipped, by file."""

    def dataset(self, rounds: tuple[int, int] | None = None, columns: Sequence[str] | None = None) -> Any:
        """Rows as a `ray.data.Dataset` of this version (starts or uses Ray); arguments as for `arrow`.

        Each data file is read, and checked, by one task. The version is held as long as the dataset is.

        Raises (when the dataset runs):
            BadFileError: a file is damaged.
        """
        import ray.data

        chosen = _in_rounds(self.files, rounds)
        if not chosen:
            return ray.data.from_arrow(_schema(columns).empty_table())
        # rows are read later: this object may be closed by then
        lease = ReaderLease(self.location, self.version)
        read = _DatasetRead(self._store, chosen, rounds, columns, lease=lease)
        items = ray.data.from_items([{"file": at} for at in range(len(chosen))], override_num_blocks=len(chosen))
        return items.map_batches(read, batch_size=1, batch_format="pyarrow", zero_copy_batch=True)

    def arrow(self, rounds: tuple[int, int] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows as an Arrow table.

        Args:
            rounds: first and last round, both included; None: all.
            columns: default: all.
        """
        tables = [_schema(columns).empty_table(), *(rows for _, rows in self.tables(rounds, columns))]
        return pa.concat_tables(tables).replace_schema_metadata(self.metadata.to_configuration())

    def tables(
        self, rounds: tuple[int, int] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[StoredFile, pa.Table]]:
        """Rows file by file, by round; arguments as for `arrow`. Damaged files are skipped; see `bad_files`.

        Threads read the next two files while the caller works on one: three are in memory.
        """
        wanted = _in_rounds(self.files, rounds)
        return self._ahead(
            wanted, lambda file: iter([_read_rounds(self._store, file, rounds, columns)]), ahead=_TABLES_AHEAD, depth=1
        )

    def pieces(self, rounds: tuple[int, int] | None = None, *, batch: int = 1) -> Iterator[tuple[StoredFile, Records]]:
        """Rows as `Records` of some megabytes, file by file, by round: for logs of any size.

        Each file is checked whole before its first rows come; damaged files are skipped, see `bad_files`. Threads read and parse
        while the caller works; some pieces of two files are in memory.

        Args:
            rounds: as for `arrow`.
            batch: a piece has a multiple of this many rows, except for a file's last (and those that `rounds` cuts).
        """
        wanted = _in_rounds(self.files, rounds)
        return self._ahead(
            wanted, lambda file: _read_pieces(self._store, file, rounds, batch), ahead=1, depth=_PIECES_AHEAD
        )

    def _ahead(
        self, wanted: list[StoredFile], read: Callable[[StoredFile], Iterator[T]], *, ahead: int, depth: int
    ) -> Iterator[tuple[StoredFile, T]]:
        coming = read_ahead((partial(read, file) for file in wanted), ahead=ahead, depth=depth)
        with contextlib.closing(coming):
            for file, found in zip(wanted, coming, strict=True):
                try:
                    for item in found:
                        yield file, item
                        del item  # else one more is in memory
                except BadFileError as error:
                    self._note_bad(error, file)

    def _note_bad(self, error: BadFileError, file: StoredFile) -> None:
        if error.name not in {bad.name for bad in self.bad_files}:
            log.warning("%s: %s: skipped, %d rows", self.location, error, file.rows)
            self.bad_files.append(error)

    def records(self, rounds: tuple[int, int] | None = None) -> Records:
        """Rows as `Records`; `rounds` as for `arrow`."""
        return Records.from_arrow(self.arrow(rounds))

    def close(self) -> None:
        """Release the version: its files may be removed from now on."""
        self._lease.release()

    def __enter__(self) -> MistakeLog:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _DatasetRead:
    """Reads one file in a Ray task. The object on the driver holds the version; a task gets what it needs to read."""

    def __init__(self, store: LogStore, files: list[StoredFile], *asked: Any, lease: ReaderLease | None = None) -> None:
        self._store, self._files, self._asked, self._lease = store, files, asked, lease

    def __reduce__(self) -> tuple[Any, ...]:
        return _dataset_read, (self._store.location, self._store.version, self._files, self._asked)

    def __call__(self, batch: pa.Table) -> pa.Table:
        files = [self._files[at] for at in batch.column("file").to_pylist()]
        return pa.concat_tables([_read_rounds(self._store, file, *self._asked) for file in files])


def _dataset_read(location: Location, version: int, files: list[StoredFile], asked: tuple[Any, ...]) -> _DatasetRead:
    return _DatasetRead(LogStore(location, version), files, *asked)


def _schema(columns: Sequence[str] | None) -> pa.Schema:
    unknown = [name for name in columns or () if name not in ROW_SCHEMA.names]
    if unknown:
        raise ValueError(f"columns {', '.join(unknown)}: the log has {', '.join(ROW_SCHEMA.names)}")
    return ROW_SCHEMA if columns is None else pa.schema([ROW_SCHEMA.field(name) for name in columns])


def _in_rounds(files: list[StoredFile], rounds: tuple[int, int] | None) -> list[StoredFile]:
    return [file for file in files if rounds is None or (file.round_min <= rounds[1] and file.round_max >= rounds[0])]


def _read_rounds(
    store: LogStore, file: StoredFile, rounds: tuple[int, int] | None, columns: Sequence[str] | None
) -> pa.Table:
    whole = rounds is None or (file.round_min >= rounds[0] and file.round_max <= rounds[1])
    wanted = list(_schema(columns).names)
    if whole:
        return store.read(file, wanted)
    assert rounds is not None
    rows = store.read(file, list(dict.fromkeys([*wanted, "round"])))
    return _cut(rows, rounds).select(wanted)


def _read_pieces(store: LogStore, file: StoredFile, rounds: tuple[int, int] | None, batch: int) -> Iterator[Records]:
    whole = rounds is None or (file.round_min >= rounds[0] and file.round_max <= rounds[1])
    for piece in store.read_pieces(file, batch):
        rows = piece if whole or rounds is None else _cut(piece, rounds)
        if rows.num_rows:
            yield _as_records(store, file, rows)


def _cut(rows: pa.Table, rounds: tuple[int, int]) -> pa.Table:
    return rows.filter((pc.field("round") >= rounds[0]) & (pc.field("round") <= rounds[1]))


def _records(store: LogStore, file: StoredFile) -> Records:
    return _as_records(store, file, store.read(file))


def _as_records(store: LogStore, file: StoredFile, rows: pa.Table) -> Records:
    try:
        return Records.from_arrow(rows, store.metadata.to_configuration())
    except ValueError as error:  # committed, but not by a writer of this log
        raise BadFileError(file.name, str(error)) from error
