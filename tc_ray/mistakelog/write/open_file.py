"""The rows of the data file that is being written, kept in memory until the file is complete.

Invariant: what was added is never lost to a failed write: `withdraw` takes the unfinished file off the disk at once (so that it
holds no space and nobody finds it), and the next `write` or `finish` begins it anew from memory. The rows are the views that
the records gave, so keeping them costs up to `file_bytes` and one round. Used by the record writer's thread.
"""

from __future__ import annotations

import contextlib
import logging

import pyarrow as pa

from tc_ray.mistakelog.table.data_file import TEMPORARY_SUFFIX, Compression, Finished, ParquetPart
from tc_ray.mistakelog.table.location import Location

log = logging.getLogger(__name__)


class HeldPart:
    """Rows of one data file, by round.

    Args:
        location: of the table.
        compression: of the Parquet pages.
    """

    def __init__(self, location: Location, compression: Compression) -> None:
        self._location, self._compression = location, compression
        self._part: ParquetPart | None = None
        self._tries = 0
        self.clear()

    def clear(self) -> None:
        """Forget all rows: they stand in a finished file, or were counted as dropped."""
        self._tables: list[tuple[pa.Table, int]] = []
        self._written = 0
        self.counts: dict[int, int] = {}
        """Rows by round."""
        self.bytes = 0
        """Of the rows in memory, uncompressed."""

    @property
    def rows(self) -> int:
        """Rows held."""
        return sum(self.counts.values())

    def add(self, round: int, table: pa.Table) -> None:
        """Take rows of a round that has ended; the metadata of the table's schema goes into the file."""
        size = table.get_total_buffer_size()
        self._tables.append((table, size))
        self.counts[round] = self.counts.get(round, 0) + table.num_rows
        self.bytes += size

    def write(self, name: str) -> None:
        """Bring to the file what is not in it yet.

        Args:
            name: of the file when it is finished; the same until `clear`.

        Raises:
            OSError: the disk or store does not take it; `withdraw` then.
        """
        if self._part is None and self._tables:
            # after a failure another name: the upload that seemed to fail might still arrive
            unique = name if not self._tries else f"{name.removesuffix('.parquet')}-t{self._tries}.parquet"
            told = self._tables[0][0].schema.metadata or {}
            metadata = {key.decode(): value.decode() for key, value in told.items()}
            self._part, self._written = ParquetPart(self._location, unique, self._compression, metadata), 0
        for table, size in self._tables[self._written :]:
            assert self._part is not None
            self._part.write(table, size)
            self._written += 1

    def finish(self, name: str) -> tuple[str, Finished]:
        """Complete the file.

        Returns:
            Its final name, and its size and CRC-32.

        Raises:
            OSError: as for `write`.
        """
        self.write(name)
        assert self._part is not None, "no rows: nothing to finish"
        finished = self._part.finish()
        final, self._part, self._tries = self._part.name, None, 0
        return final, finished

    def withdraw(self) -> None:
        """Take the unfinished file away; the rows stay."""
        part, self._part = self._part, None
        if part is None:
            return
        self._tries += 1
        try:
            part.abort()
        except Exception:  # what failed once may fail in closing too: the rows are here, and the file goes below
            log.debug("%s: closing the unfinished %s failed", self._location, part.name, exc_info=True)
        # it may have got its final name before the failure, but nobody was told of it
        for name in (part.name + TEMPORARY_SUFFIX, part.name):
            with contextlib.suppress(OSError):
                self._location.delete(name)
