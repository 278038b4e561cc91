"""One Parquet data file: written under a temporary name, made durable, renamed into the table's folder, read with a check.

Invariant: a file under its final name is complete and on the disk (in an object store: uploaded). It belongs to the table
only once the Ledger has committed it. The CRC-32 is computed from the bytes as they are handed to the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from zlib_ng.zlib_ng import crc32 as crc32_of

from tc_ray.mistakelog.rows.schema import PREFIX, ROW_SCHEMA, SCHEMA_VERSION
from tc_ray.mistakelog.table.location import Location

TEMPORARY_SUFFIX = ".tmp"
"""Added to a local file's name while it is written."""
ROW_GROUP_BYTES = 16 << 20
"""Rows wait in memory until a row group has this size: small ones read slowly."""
_PIECE_BYTES = 6 << 20

Compression = Literal["none", "zstd"]


@dataclass(frozen=True)
class DataFile:
    """A finished file, or coverage alone (a rank had no rows in some rounds), as handed to the Ledger."""

    name: str | None
    """File name inside the table's folder; None: no rows, only coverage."""
    rows: int
    bytes: int
    round_min: int
    """First round covered: the one after the last that this rank has covered."""
    round_max: int
    """Last round covered: every record of this rank up to it is in this or an earlier file."""
    rank: int
    attempt: int
    sequence: int
    """Number of this commit of the rank in the attempt, from 0; -1: a copy that replaces other files."""
    crc32: int = 0
    """Of the file's bytes; 0 without a file."""
    dropped: dict[int, int] = field(default_factory=dict)
    """Records of the covered rounds that are not in the log: round -> count."""

    @property
    def key(self) -> str:
        """For messages."""
        return f"rank {self.rank}, attempt {self.attempt}, sequence {self.sequence}"


def file_name(round_min: int, rank: int, attempt: int, sequence: int) -> str:
    """Name of a data file; unique in a run, and known before its last round is."""
    return f"rounds-{round_min:08d}-rank{rank}-a{attempt}-{sequence:06d}.parquet"


class Finished(NamedTuple):
    """The bytes of a finished file."""

    size: int
    crc32: int


class _Output:
    """The file or upload that Arrow writes into. Counts the bytes and computes their CRC-32 on the way."""

    closed = False  # Arrow asks

    def __init__(self, location: Location, name: str) -> None:
        self._local = location.local is not None
        self._file = location.open_output(name)
        self._size = self._crc32 = 0
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="mistake-log-sync")
        self._syncs: list[Future[None]] = []

    def write(self, data: bytes) -> int:
        """With a page or a header."""
        written = self._file.write(data)
        while written < len(data):  # a file may take a part
            written += self._file.write(memoryview(data)[written:])
        self._crc32 = crc32_of(data, self._crc32)
        self._size += written
        return written

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> None:
        """`complete` ends the file."""

    def sync_so_far(self) -> None:
        """Bring what is written to the disk, in a thread: little is left to wait for at the end of the file."""
        if self._local:
            self._syncs.append(self._threads.submit(os.fdatasync, self._file.fileno()))

    def complete(self) -> Finished:
        """Bring everything to the disk, or end the upload."""
        self._threads.shutdown()
        for sync in self._syncs:
            sync.result()  # the system reports a page that it could not write to one sync only, perhaps to this one
        if self._local:
            os.fsync(self._file.fileno())
        self._file.close()
        return Finished(self._size, self._crc32)

    def abandon(self) -> None:
        """Close an unfinished file, which its owner deletes. An upload that is not closed never becomes an object."""
        self._threads.shutdown()
        if self._local:
            self._file.close()


class ParquetPart:
    """A data file being written.

    Args:
        name: of the finished file. A local file has `TEMPORARY_SUFFIX` added until then.
        metadata: key-value metadata of the file, so that it can be read by itself.
    """

    def __init__(self, location: Location, name: str, compression: Compression, metadata: dict[str, str]) -> None:
        self.name = name
        self._location = location
        self._temporary = name + TEMPORARY_SUFFIX if location.local is not None else name
        self._compression, self._metadata = compression, metadata
        self._output: _Output | None = None
        self._writer: Any = None
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self.rows = 0

    def write(self, table: pa.Table, size: int | None = None) -> None:
        """Add rows of `size` bytes in memory. Raises OSError if the disk or store does not take them; call `abort` then."""
        self._waiting.append(table)
        self._waiting_bytes += table.get_total_buffer_size() if size is None else size
        self.rows += table.num_rows
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._write_row_group().sync_so_far()

    def _write_row_group(self) -> _Output:
        if self._output is None:
            self._output = _Output(self._location, self._temporary)
            self._writer = pq.ParquetWriter(
                pa.PythonFile(self._output, "w"),
                ROW_SCHEMA,
                compression=self._compression,
                # hidden states are all different: a dictionary would only cost
                use_dictionary=["run"],
                write_statistics=["run", "attempt", "round", "rank", "sample_id"],
                store_schema=False,
            )
            self._writer.add_key_value_metadata(self._metadata)
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_bytes = [], 0
        return self._output

    def finish(self) -> Finished:
        """Complete the file, bring it to the disk and give it its final name. Raises OSError as `write` does."""
        output = self._write_row_group()
        self._writer.close()
        finished = output.complete()
        if self._location.local is not None:
            self._location.rename(self._temporary, self.name)
        return finished

    def abort(self) -> None:
        """Throw the unfinished file away, under both of its names: a rename may have come before the failure."""
        with contextlib.suppress(Exception):  # closing writes the footer, which a full disk does not take either
            if self._writer is not None:
                self._writer.close()
        if self._output is not None:
            with contextlib.suppress(OSError):
                self._output.abandon()
        for name in {self._temporary, self.name}:
            with contextlib.suppress(OSError):
                self._location.delete(name)


class BadFileError(ValueError):
    """A data file is not what was committed: missing, cut short, altered, foreign or not readable."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Committed(NamedTuple):
    """What a file's commit says about it."""

    size: int
    crc32: int
    rows: int


def read_file(location: Location, name: str, committed: Committed, columns: list[str] | None = None) -> pa.Table:
    """Rows of one data file with the types of `ROW_SCHEMA`. The file is checked against its commit before it is parsed.

    Args:
        columns: default: all.

    Raises:
        BadFileError: the file is damaged; says how.
        OSError: the location cannot be read just now.
    """
    content = _checked(location, name, committed)
    schema = ROW_SCHEMA if columns is None else pa.schema([ROW_SCHEMA.field(column) for column in columns])
    with _parsing(name):
        file = _parquet(name, content, schema, committed.rows)
        return file.read(columns=schema.names, use_threads=False).select(schema.names).cast(schema)


def read_pieces(location: Location, name: str, committed: Committed, *, rows: int) -> Iterator[pa.Table]:
    """As `read_file` with all columns, but some rows at a time. Nothing is parsed before the whole file was checked.

    A piece is about `_PIECE_BYTES`, which stay in the processor's cache: parsing to pieces takes a half to two thirds of the time
    of parsing to one table, which is grown and copied on the way.

    Args:
        rows: a piece has a multiple of this many, except for the file's last.
    """
    content = _checked(location, name, committed)
    with _parsing(name):
        file = _parquet(name, content, ROW_SCHEMA, committed.rows)
        fitting = file.metadata.num_rows * _PIECE_BYTES // content.size // rows * rows
        pieces = file.iter_batches(max(rows, fitting), columns=ROW_SCHEMA.names, use_threads=False)
    while True:
        with _parsing(name):
            piece = next(pieces, None)
            if piece is None:
                return
            table = pa.Table.from_batches([piece])
            if not table.schema.equals(ROW_SCHEMA):
                table = table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
        yield table


def compression_of(location: Location, name: str) -> Compression:
    """How a file's pages are compressed, for a copy that replaces it."""
    metadata = pq.ParquetFile(pa.BufferReader(location.buffer(name))).metadata
    codecs = (
        {metadata.row_group(0).column(i).compression for i in range(metadata.num_columns)} if metadata.num_rows else ()
    )
    return "zstd" if "ZSTD" in codecs else "none"


def _checked(location: Location, name: str, committed: Committed) -> pa.Buffer:
    try:
        found = location.size(name)  # an empty file cannot be mapped
        if found is not None and found != committed.size:
            raise BadFileError(name, f"{found} bytes, committed with {committed.size}")
        content = location.buffer(name)
    except FileNotFoundError:
        raise BadFileError(name, "missing") from None
    if crc32_of(content) != committed.crc32:
        raise BadFileError(name, "its bytes differ from those committed (CRC-32)")
    return content


def _parquet(name: str, content: pa.Buffer, schema: pa.Schema, rows: int) -> pq.ParquetFile:
    """The opened file, with the columns of `schema` and as many rows as were committed."""
    file = pq.ParquetFile(pa.BufferReader(content))
    version = (file.metadata.metadata or {}).get(f"{PREFIX}schema_version".encode())
    if version is not None and version.decode() != str(SCHEMA_VERSION):
        raise BadFileError(
            name, f"Mistake Log schema version {version.decode()}, but this tc-ray reads version {SCHEMA_VERSION}"
        )
    if file.metadata.num_rows != rows:
        raise BadFileError(name, f"{file.metadata.num_rows} rows, committed with {rows}")
    absent = [column for column in schema.names if column not in file.schema_arrow.names]
    if absent:
        raise BadFileError(name, f"columns {', '.join(absent)} are missing: not a file of this log")
    return file


@contextlib.contextmanager
def _parsing(name: str) -> Iterator[None]:
    """Turns what Arrow raises into `BadFileError`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, (BadFileError, MemoryError)):  # short memory says nothing about the file
            raise
        raise BadFileError(name, f"no readable Parquet of this log: {str(error).splitlines()[0][:200]}") from error
