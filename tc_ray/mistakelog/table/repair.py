"""The transaction log on a local disk: brought to the disk, opened, and put right after a power cut.

delta-rs writes its files but does not sync them. Invariants:

- The store syncs each commit before anything is acknowledged or built upon it (`renew_commits`). A file whose sync may have
  failed is never synced again: the system may have marked its pages as clean while the disk holds zeros. Instead the commit's
  bytes, which the cache still holds, are written to a new file, which is synced and renamed over the old one.
- So a power cut can tear only the newest commit, which was never acknowledged, and a checkpoint that another tool made, which
  only summarises commits. Both are moved aside. A torn commit with whole commits after it is damage that no crash makes.

Called by the store and by the holder of the run's lease; torn checkpoints are moved aside by whoever cannot open the table.
Object stores have no torn files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from tc_ray.files import sync, write_file
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.commits import LOG_FOLDER, commit_name, parse_commit
from tc_ray.mistakelog.table.location import Location

TORN_FOLDER = "_tc_ray/torn"
NEWEST = 8
"""Commits that are checked, and synced again by a new owner: one can be torn, the others show that it is the last."""
LAST_CHECKPOINT = "_last_checkpoint"
_SCRATCH = "_tc_ray/checkpoint.writing"
_COMMIT = re.compile(r"\d{20}\.json")

log = logging.getLogger(__name__)


def is_table(location: Location) -> bool:
    """There is a Delta table at the location."""
    return DeltaTable.is_deltatable(location.uri, storage_options=location.options)


def open_table(location: Location, version: int | None = None) -> DeltaTable:
    """The table at a version; default: the newest. A torn checkpoint is moved aside: the commits that it summarises are there.

    Raises LogSchemaError: the newest commit is torn, which only the holder of the lease may put right.
    """

    def opened() -> DeltaTable:
        return DeltaTable(location.uri, version=version, storage_options=location.options)

    try:
        return opened()
    except DeltaError:
        if torn := _torn_commit(location):
            raise LogSchemaError(
                f"{torn}: torn, as a power cut leaves a commit that was never acknowledged; the next start of the run, or "
                "`tc-ray log vacuum`, moves it aside"
            ) from None
        checkpoints = _torn_checkpoints(location)
        if not checkpoints:
            raise
        for path in checkpoints:
            _move(location, path)
        return opened()


def renew_commits(location: Location, versions: Iterable[int]) -> None:
    """Write commits anew, oldest first, and sync them with their names.

    Raises OSError if the disk does not take a commit, or what is read back is no commit: it is lost, and was never acknowledged.
    """
    if location.local is None:
        return
    for version in versions:
        path = location.path(commit_name(version))
        content, found = path.read_bytes(), path.stat()
        try:
            parse_commit(version, content)
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(
                errno.EIO,
                f"a commit that was made just now cannot be read back ({error}): the disk has lost it",
                str(path),
            ) from None
        write_file(path, content)
        # the time of a commit says when its removed files left the table
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def write_checkpoint(location: Location, table: DeltaTable) -> None:
    """Summarise the commits up to the table's version in one Parquet file of Delta's own, so that opening stays quick.

    A local checkpoint is made beside the table, from copies of the commits since the last one, and gets its name only when it
    is on the disk. Raises OSError or DeltaError if it was not made; the table is as it was.
    """
    if location.local is None:
        table.create_checkpoint()
        return
    folder, scratch, version = location.path(LOG_FOLDER), location.path(_SCRATCH), int(table.version())
    pointer, first = folder / LAST_CHECKPOINT, 0
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that died
    try:
        (scratch / LOG_FOLDER).mkdir(parents=True)
        if pointer.exists():
            first = int(json.loads(pointer.read_bytes())["version"])
            shutil.copy(pointer, scratch / LOG_FOLDER)
        for path in folder.iterdir():
            number = path.name.split(".")[0]
            if len(number) == 20 and number.isdecimal() and first <= int(number) <= version:
                shutil.copy(path, scratch / LOG_FOLDER)
        DeltaTable(str(scratch), version=version).create_checkpoint()
        name = f"{version:020d}.checkpoint.parquet"
        sync(scratch / LOG_FOLDER / name)
        os.rename(scratch / LOG_FOLDER / name, folder / name)
        sync(folder)
        write_file(pointer, (scratch / LOG_FOLDER / LAST_CHECKPOINT).read_bytes())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def repair(location: Location) -> str | None:
    """Move the newest commit aside if it is torn, for the holder of the lease. Returns what was moved, in words.

    Raises LogSchemaError if a commit is damaged and later ones are whole.
    """
    torn = _torn_commit(location)
    moved = None if torn is None else _move(location, torn)
    for path in _torn_checkpoints(location):  # delta-rs opens a table without reading all of one
        _move(location, path)
    return moved


def _torn_commit(location: Location) -> Path | None:
    if location.local is None or not (location.local / LOG_FOLDER).is_dir():
        return None
    newest = sorted(path for path in location.path(LOG_FOLDER).iterdir() if _COMMIT.fullmatch(path.name))[-NEWEST:]
    torn = None
    for path in reversed(newest):
        try:
            parse_commit(int(path.stem), path.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            if path != newest[-1]:
                raise LogSchemaError(
                    f"{path}: damaged commit ({error}) with whole commits after it: no crash does this; restore the file "
                    "from a backup"
                ) from None
            torn = path
    return torn


def _torn_checkpoints(location: Location) -> list[Path]:
    """Checkpoints that cannot be read, and the pointer to the newest one if it is torn or leads to none."""
    if location.local is None:
        return []
    folder = location.path(LOG_FOLDER)
    torn, whole = [], []
    for path in folder.glob("*.checkpoint.parquet"):
        try:
            pq.ParquetFile(path).read()
            whole.append(path.name)
        except (pa.ArrowException, OSError):
            torn.append(path)
    pointer = folder / LAST_CHECKPOINT
    with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
        if f"{int(json.loads(pointer.read_bytes())['version']):020d}.checkpoint.parquet" in whole:
            return torn
    return [*torn, pointer] if pointer.exists() else torn


def _move(location: Location, path: Path) -> str:
    aside = location.path(TORN_FOLDER)
    aside.mkdir(parents=True, exist_ok=True)
    moved = f"{path.name} (torn at {path.stat().st_size} bytes) moved to {TORN_FOLDER}"
    os.rename(path, aside / path.name)
    sync(aside)
    sync(path.parent)
    log.warning("%s: %s", location, moved)
    return moved
