"""Fencing: which files leave the log when the Pilot resumes from a checkpoint, and the copies that replace files cut by it."""

from __future__ import annotations

import uuid

from tc_ray.mistakelog.maintain.compaction import write_copy
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.store import LogStore, StoredFile


def fenced_files(files: list[StoredFile], watermark: int) -> list[StoredFile]:
    """Files with rounds after the watermark."""
    return [file for file in files if file.round_max > watermark]


def trimmed(store: LogStore, file: StoredFile, watermark: int, attempt: int) -> DataFile:
    """Write a copy of `file` without the rounds after `watermark`, to be committed in its place.

    Args:
        attempt: the attempt that fences.

    Raises:
        BadFileError: the file is damaged; quarantine takes it out of the log.
    """
    # a name of its own: another process that believes to fence may have committed a copy too
    name = f"{file.name.removesuffix('.parquet')}-cut{watermark}-a{attempt}-{uuid.uuid4().hex[:12]}.parquet"
    return write_copy(store, [file], name, watermark=watermark)
