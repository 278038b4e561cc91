"""One Parquet data file: written under a temporary name, made durable, then renamed into the table's folder.

Invariant: a file under its final name is complete and on disk. It belongs to the table only once the Ledger has committed
it, so readers, who go by the table's file list, see neither temporary nor uncommitted files. Used by the record writer
and by the store when it cuts a file at a watermark.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.mistakelog.schema import ROW_SCHEMA

TEMPORARY_SUFFIX = ".parquet.tmp"
_HASH_BYTES = 1 << 20
# rows wait in memory until a row group of this size: small ones read slowly
_ROW_GROUP_BYTES = 16 << 20

Compression = Literal["none", "zstd"]


@dataclass(frozen=True)
class DataFile:
    """A finished file, or the bare statement that a rank had no rows in some rounds, as handed to the Ledger."""

    name: str | None
    """File name inside the table's folder; None: no rows, only coverage."""
    rows: int
    bytes: int
    round_min: int
    """First round covered: the one after the last covered by this rank."""
    round_max: int
    """Last round covered; every record of this rank up to it is in this or an earlier file."""
    rank: int
    attempt: int
    sequence: int
    """Counts the commits of this rank in this attempt from 0."""
    sha256: str
    """Of the file's bytes, hexadecimal; empty without a file."""
    crc32: int = 0
    """Of the file's bytes: what readers check each time."""
    dropped: dict[int, int] = field(default_factory=dict)
    """Records of the covered rounds that are not in the log because it could not be written: count by round."""

    @property
    def key(self) -> str:
        """For messages."""
        return f"rank {self.rank}, attempt {self.attempt}, sequence {self.sequence}"


def file_name(round_min: int, round_max: int, rank: int, attempt: int, sequence: int) -> str:
    """Final name of a data file; unique in a run."""
    return f"rounds-{round_min:08d}-{round_max:08d}-rank{rank}-a{attempt}-{sequence:06d}.parquet"


def temporary_name(rank: int, attempt: int, sequence: int) -> str:
    """Name while the file is written: its rounds are not known yet."""
    return f"rank{rank}-a{attempt}-{sequence:06d}{TEMPORARY_SUFFIX}"


class ParquetPart:
    """A data file being written.

    Args:
        folder: the table's folder.
        temporary: name until `finish`.
        compression: of the Parquet pages.
        metadata: key-value metadata of the file, so that it can be read by itself.
    """

    def __init__(self, folder: Path, temporary: str, compression: Compression, metadata: dict[str, str]) -> None:
        self._folder = folder
        self._path = folder / temporary
        self._writer = pq.ParquetWriter(
            self._path,
            ROW_SCHEMA,
            compression=compression,
            # hidden states are all different: a dictionary would only cost
            use_dictionary=["run"],
            write_statistics=["run", "attempt", "round", "rank", "sample_id"],
            store_schema=False,
        )
        self._writer.add_key_value_metadata(metadata)
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self.rows = 0
        self.bytes = 0

    def write(self, table: pa.Table) -> None:
        """Add rows. `bytes` counts them in memory, uncompressed."""
        size = table.get_total_buffer_size()
        self._waiting.append(table)
        self._waiting_bytes += size
        self.rows += table.num_rows
        self.bytes += size
        if self._waiting_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def _write_row_group(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def finish(self, name: str) -> tuple[int, str]:
        """Complete the file, flush it to disk and give it its final name.

        Returns:
            Size in bytes and SHA-256 (hexadecimal).
        """
        self._write_row_group()
        self._writer.close()
        digest = hashlib.sha256()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            while block := file.read(_HASH_BYTES):
                digest.update(block)
            size = file.tell()
        os.rename(self._path, self._folder / name)
        sync_folder(self._folder)
        return size, digest.hexdigest()

    def abort(self) -> None:
        """Throw the unfinished file away."""
        self._waiting = []
        # closing writes the footer: on a full disk it fails, and the file goes anyway
        with contextlib.suppress(OSError):
            self._writer.close()
        self._path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: without it a rename can be lost with the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Rows of one data file with the types of `ROW_SCHEMA`, whoever wrote it.

    Raises:
        OSError, pa.ArrowInvalid: the file is missing or no readable Parquet.
    """
    table = pq.ParquetFile(path).read(columns=columns, use_threads=False)
    schema = ROW_SCHEMA if columns is None else pa.schema([ROW_SCHEMA.field(name) for name in columns])
    return table.select(schema.names).cast(schema)
