"""Readers of the Mistake Log: `LogTail` follows a growing log, `MistakeLog` reads one version of it.

Invariant: a reader goes by the file list of one table version, so it never sees an unfinished, uncommitted or half-fenced
file, and what it returns for a version never changes. Called by the Copilot (tail) and by users and tools (log).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tc_ray.mistakelog.datafile import read_file
from tc_ray.mistakelog.records import Records
from tc_ray.mistakelog.schema import ROW_SCHEMA, LogMetadata
from tc_ray.mistakelog.store import LogStore, StoredFile


@dataclass(frozen=True)
class Update:
    """What changed in the log since the last poll."""

    new: list[tuple[str, Records]]
    """Added files by round, with their records."""
    removed: list[str]
    """Files that are no longer part of the log (fenced, or replaced): forget their records. May name files passed over."""
    version: int
    """Table version this update ends at."""


class LogTail:
    """Reads each file of a growing log once.

    Args:
        path: folder of the table.
        run: refuse the log of another run; None: any.

    Raises:
        LogSchemaError: no Mistake Log there, or an unknown schema version.
    """

    def __init__(self, path: str | Path, run: str | None = None) -> None:
        self._store = LogStore(path)
        if run is not None and run != self._store.metadata.run:
            raise ValueError(f"{path} is the log of run {self._store.metadata.run!r}, not {run!r}")
        self._known: set[str] = set()

    @property
    def metadata(self) -> LogMetadata:
        """The log's metadata."""
        return self._store.metadata

    def poll(self, version: int | None = None, *, min_round: int = 0) -> Update:
        """Read what is new.

        Args:
            version: go to this version, also an older one; default: the latest.
            min_round: new files that end before this round are passed over, now and later, and not read.

        Raises:
            OSError, pyarrow.ArrowInvalid: a file of the log cannot be read; the next poll tries it again.
        """
        self._store.refresh(version)
        files = {file.name: file for file in self._store.files()}
        added = [file for name, file in files.items() if name not in self._known]
        new = [(file.name, self._read(file)) for file in added if file.round_max >= min_round]
        removed = sorted(self._known - files.keys())
        self._known = set(files)
        return Update(new, removed, self._store.version)

    def _read(self, file: StoredFile) -> Records:
        return Records.from_arrow(read_file(self._store.path / file.name), self.metadata.to_configuration())


class MistakeLog:
    """One version of a log.

    Args:
        path: folder of the table.
        version: default: the latest at this moment.

    Raises:
        LogSchemaError: no Mistake Log there, or an unknown schema version.
    """

    def __init__(self, path: str | Path, version: int | None = None) -> None:
        self._store = LogStore(path, version)

    @property
    def metadata(self) -> LogMetadata:
        """The log's metadata."""
        return self._store.metadata

    @property
    def version(self) -> int:
        """Table version that everything here is read from."""
        return self._store.version

    @property
    def files(self) -> list[StoredFile]:
        """Data files, by round."""
        return self._store.files()

    def dataset(self, columns: list[str] | None = None) -> Any:
        """All rows as a `ray.data.Dataset` pinned to this version (starts or uses Ray)."""
        import ray.data

        return ray.data.read_delta(str(self._store.path), version=self.version, columns=columns)

    def arrow(self, rounds: tuple[int, int] | None = None, columns: list[str] | None = None) -> pa.Table:
        """Rows as an Arrow table.

        Args:
            rounds: first and last round, both included; None: all.
            columns: default: all.
        """
        read = None if columns is None else list(dict.fromkeys([*columns, "round"]))
        tables = []
        for file in self._store.files():
            if rounds is None or (file.round_min <= rounds[1] and file.round_max >= rounds[0]):
                rows = read_file(self._store.path / file.name, read)
                if rounds is not None:
                    rows = rows.filter((pc.field("round") >= rounds[0]) & (pc.field("round") <= rounds[1]))
                tables.append(rows if columns is None else rows.select(columns))
        schema = ROW_SCHEMA if columns is None else pa.schema([ROW_SCHEMA.field(name) for name in columns])
        table = pa.concat_tables([schema.empty_table(), *tables])
        return table.replace_schema_metadata(self.metadata.to_configuration())

    def records(self, rounds: tuple[int, int] | None = None) -> Records:
        """Rows as `Records`; `rounds` as for `arrow`."""
        return Records.from_arrow(self.arrow(rounds))
