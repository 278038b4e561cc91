"""The data file that is being written; its rows stay in memory until the file is complete.

Invariant: a failed write loses no row. `withdraw` takes the unfinished file off the disk at once, so that it holds no space and
no reader finds it, and the next `write` or `finish` begins it anew from memory. States are views of the records' arrays, so
keeping the rows costs up to `log.file_bytes` and one round. Used by the record writer's thread.
"""

from __future__ import annotations

import pyarrow as pa

from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table import data_file
from tc_ray.mistakelog.table.data_file import Compression, Finished, ParquetPart
from tc_ray.mistakelog.table.location import Location


class OpenFile:
    """Rows of one data file, by round. run: of the log."""

    def __init__(self, location: Location, compression: Compression, run: str) -> None:
        self._location, self._compression, self._run = location, compression, run
        self._part: ParquetPart | None = None
        self._failures = 0
        self.clear()

    def clear(self) -> None:
        """Forget all rows: they stand in a finished file."""
        self._waiting: list[Records] = []
        self._waiting_bytes = 0
        self._tables: list[tuple[pa.Table, int]] = []
        self._written = 0
        self.rows = 0
        self.bytes = 0
        """Of the rows as the table holds them, uncompressed."""

    def add(self, records: Records) -> None:
        """Take records of a round that has ended. Raises ValueError if they are not valid."""
        records.validate()
        size = records.nbytes - (records.rationale.nbytes // 2 if records.rationale_dtype == "int8" else 0)
        if size >= data_file.ROW_GROUP_BYTES:  # a table of its own, in which nothing is copied
            self._gather()
        self._waiting.append(records)
        self._waiting_bytes += size
        self.rows += len(records)
        self.bytes += size
        if self._waiting_bytes >= data_file.ROW_GROUP_BYTES:
            self._gather()

    def _gather(self) -> None:
        """Make one table of the records that wait: for each round one would take a quarter of the writer's time."""
        if self._waiting:
            self._tables.append((Records.join_to_arrow(self._waiting, self._run), self._waiting_bytes))
        self._waiting, self._waiting_bytes = [], 0

    def write(self, name: str) -> None:
        """Bring to the file, which is called `name` when it is finished, the row groups that are not in it yet.

        Raises OSError if the disk or store does not take it; `withdraw` then.
        """
        if self._part is None and self._tables:
            # after a failure another name: the upload that seemed to fail might still arrive
            unique = name if not self._failures else f"{name.removesuffix('.parquet')}-t{self._failures}.parquet"
            stored = self._tables[0][0].schema.metadata or {}
            metadata = {key.decode(): value.decode() for key, value in stored.items()}
            self._part, self._written = ParquetPart(self._location, unique, self._compression, metadata), 0
        for table, size in self._tables[self._written :]:
            assert self._part is not None
            self._part.write(table, size)
            self._written += 1

    def finish(self, name: str) -> tuple[str, Finished]:
        """Complete the file. Returns its final name, and its size and CRC-32; raises as `write` does."""
        self._gather()
        self.write(name)
        assert self._part is not None, "no rows: nothing to finish"
        finished = self._part.finish()
        final, self._part, self._failures = self._part.name, None, 0
        return final, finished

    def withdraw(self) -> None:
        """Take the unfinished file away; the rows stay."""
        part, self._part = self._part, None
        if part is not None:
            self._failures += 1
            part.abort()
