"""What a data file is written into: checksums that follow the file, and a sync beside the writing whose error counts."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import time
import zlib
from pathlib import Path

import pytest

from tc_ray.mistakelog.table.data_file import ParquetPart
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.output import LocalOutput
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
    assert done.sha256 == hashlib.sha256(content).hexdigest()
    assert done.crc32 == zlib.crc32(content)


def test_hashing_follows_a_row_group_while_it_is_written(tmp_path: Path) -> None:
    path, rows = tmp_path / "part", random.Random(0).randbytes(1 << 20)
    output = LocalOutput(path)
    output.growing()
    for count in range(1, 5):
        output.sink.write(rows)
        end = time.monotonic() + 20
        while output._checksums._size < count << 20:
            assert time.monotonic() < end, "what stands in the file is not hashed before the row group's end"
            time.sleep(0.002)
    output.advance()
    output.growing()
    output.sink.write(rows[:1000])  # too little to be worth a look
    done = output.complete()
    content = path.read_bytes()
    assert (done.size, done.sha256, done.crc32) == (
        (4 << 20) + 1000,
        hashlib.sha256(content).hexdigest(),
        zlib.crc32(content),
    )


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
