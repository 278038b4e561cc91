"""What a data file is written into: a CRC-32 that follows the bytes, and a sync beside the writing whose error counts."""

from __future__ import annotations

import errno
import os
import time
import zlib
from pathlib import Path

import pytest

from tc_ray.mistakelog.table.data_file import ParquetPart
from tc_ray.mistakelog.table.location import Location
from tests.support.mistakelog_samples import random_records


def written(folder: Path, groups: int) -> ParquetPart:
    """A part of `groups` whole row groups and some rows."""
    part = ParquetPart(Location(folder), "part.parquet", "none", {})
    rows = random_records(400).to_arrow("test")
    for _ in range(groups):
        part.write(rows, 16 << 20)
    part.write(rows)
    return part


def test_checksums_are_those_of_the_file(tmp_path: Path) -> None:
    done = written(tmp_path, 5).finish()
    content = (tmp_path / "part.parquet").read_bytes()
    assert done.size == len(content)
    assert done.crc32 == zlib.crc32(content)


def test_a_sync_that_failed_beside_the_writing_fails_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports a lost page once: the sync at the end would find nothing wrong."""
    calls = []

    def lost(handle: int) -> None:
        calls.append(handle)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", lost)
    part = written(tmp_path, 3)
    end = time.monotonic() + 20
    while not calls:
        assert time.monotonic() < end, "nothing is synced before the end"
        time.sleep(0.005)
    with pytest.raises(OSError, match="Input/output error"):
        part.finish()
    part.abort()
    assert not list(tmp_path.glob("*.parquet*"))
