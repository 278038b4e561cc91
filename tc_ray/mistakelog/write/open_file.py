"""The data file that is being written; its rows stay in memory until the file is complete.

Invariant: a failed write loses no row. `withdraw` takes the unfinished file off the disk at once, so that it holds no space and
no reader finds it, and the next `write` or `finish` begins it anew from memory. The rows are views of the records' arrays, so
keeping them costs up to `log.file_bytes` and one round. Used by the record writer's thread.
"""

from __future__ import annotations

import pyarrow as pa

from tc_ray.mistakelog.table.data_file import Compression, Finished, ParquetPart
from tc_ray.mistakelog.table.location import Location


class OpenFile:
    """Rows of one data file, by round."""

    def __init__(self, location: Location, compression: Compression) -> None:
        self._location, self._compression = location, compression
        self._part: ParquetPart | None = None
        self._failures = 0
        self.clear()

    def clear(self) -> None:
        """Forget all rows: they stand in a finished file."""
        self._tables: list[tuple[pa.Table, int]] = []
        self._written = 0
        self.rows = 0
        self.bytes = 0
        """Of the rows in memory, uncompressed."""

    def add(self, table: pa.Table) -> None:
        """Take rows of a round that has ended; the metadata of the table's schema goes into the file."""
        size = table.get_total_buffer_size()
        self._tables.append((table, size))
        self.rows += table.num_rows
        self.bytes += size

    def write(self, name: str) -> None:
        """Bring to the file, which is called `name` when it is finished, what is not in it yet.

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
