"""Fencing: what leaves the log when the Pilot goes on from a checkpoint, and the copies that replace files cut by it."""

from __future__ import annotations

import uuid

import pyarrow.compute as pc

from tc_ray.mistakelog.table.data_file import DataFile, ParquetPart, compression_of
from tc_ray.mistakelog.table.store import LogStore, StoredFile

_TRIMMED = -1
"""Sequence of a file that stands in for another: no commit of a writer."""


def fenced_files(files: list[StoredFile], watermark: int) -> list[StoredFile]:
    """Files with rounds after the watermark."""
    return [file for file in files if file.round_max > watermark]


def trimmed(store: LogStore, file: StoredFile, watermark: int, attempt: int) -> DataFile:
    """Write a copy of `file` without the rounds after `watermark`, to be committed in its place.

    Args:
        attempt: the attempt that fences.

    Raises:
        BadFileError: the file is damaged; `verify` with quarantine takes it out of the log.
    """
    rows = store.read(file)
    rows = rows.filter(pc.field("round") <= watermark)
    # never the name of what another process, which thinks that it fences, has committed
    name = f"{file.name.removesuffix('.parquet')}-cut{watermark}-a{attempt}-{uuid.uuid4().hex[:12]}.parquet"
    codec = compression_of(store.location, file.name)
    part = ParquetPart(store.location, name, codec, store.metadata.to_configuration())
    try:
        part.write(rows)
        done = part.finish()
    except BaseException:
        part.abort()
        raise
    return DataFile(
        name,
        rows.num_rows,
        done.size,
        file.round_min,
        watermark,
        file.rank,
        file.attempt,
        _TRIMMED,
        done.crc32,
    )
