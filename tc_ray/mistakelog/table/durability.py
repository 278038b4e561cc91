"""Commits and checkpoints of a local table brought to the disk, which delta-rs leaves to the system.

Invariant: a file whose sync may have failed is never asked again. After a failed write-back the system may mark pages as clean:
the next sync finds nothing to write and succeeds, while the disk holds zeros. So a commit's bytes, which the cache still has, are
written to a new file, which is synced and takes the old one's place; that holds as well for commits of a process that has died,
whose errors nobody knows. A checkpoint gets its name only when it is on the disk: a torn one makes a table
unopenable. Called by the store; object stores need none of it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from deltalake import DeltaTable

from tc_ray.files import sync, write_file
from tc_ray.mistakelog.table.commits import LOG_FOLDER, commit_name, parse_commit
from tc_ray.mistakelog.table.location import Location

LAST_CHECKPOINT = "_last_checkpoint"
_SCRATCH = "_tc_ray/checkpoint.writing"


def renew_commits(location: Location, versions: Iterable[int]) -> None:
    """Write commits anew, oldest first, and bring them to the disk with their names. Those that are gone are left out.

    Raises:
        OSError: the disk does not take one, or what is read back is no commit: it is lost, and was never acknowledged.
    """
    if location.local is None:
        return
    for version in versions:
        path = location.path(commit_name(version))
        try:
            content, found = path.read_bytes(), path.stat()
        except FileNotFoundError:  # cleaned up by another tool
            continue
        try:
            parse_commit(version, content)
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(
                errno.EIO,
                f"a commit that was made just now cannot be read back ({error}): the disk has lost it",
                str(path),
            ) from None
        write_file(path, content)
        # when files left the table is told by the time of the commit
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def write_checkpoint(location: Location, table: DeltaTable) -> None:
    """Sum the commits up to the table's version up in one Parquet file of Delta's own, so that opening it stays quick.

    A local one is made beside the table, from copies of the commits since the last checkpoint.

    Raises:
        OSError, DeltaError: it was not made; the table is as it was.
    """
    if location.local is None:
        table.create_checkpoint()
        return
    folder, scratch, version = location.path(LOG_FOLDER), location.path(_SCRATCH), int(table.version())
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that died
    try:
        (scratch / LOG_FOLDER).mkdir(parents=True)
        for path in _since_last_checkpoint(folder, version):
            shutil.copyfile(path, scratch / LOG_FOLDER / path.name)
        DeltaTable(str(scratch), version=version).create_checkpoint()
        name = f"{version:020d}.checkpoint.parquet"
        sync(scratch / LOG_FOLDER / name)
        os.rename(scratch / LOG_FOLDER / name, folder / name)
        sync(folder)
        write_file(folder / LAST_CHECKPOINT, (scratch / LOG_FOLDER / LAST_CHECKPOINT).read_bytes())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _since_last_checkpoint(folder: Path, version: int) -> list[Path]:
    """Files of a transaction log that a table is opened from at `version`."""
    pointer = folder / LAST_CHECKPOINT
    first = 0
    found = []
    if pointer.exists():
        first = int(json.loads(pointer.read_bytes())["version"])
        found.append(pointer)
    for path in folder.iterdir():
        number = path.name.split(".")[0]
        if len(number) == 20 and number.isdecimal() and first <= int(number) <= version:
            found.append(path)
    return found
