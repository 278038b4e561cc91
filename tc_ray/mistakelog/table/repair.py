"""The transaction log on a local disk: brought to the disk, opened, and put right after a power cut.

delta-rs writes its files but does not sync them. Invariants:

- The store syncs each commit before anything is acknowledged or built upon it (`renew_commits`). A file whose sync may have
  failed is never synced again: after a failed write-back the system may mark pages as clean, so that the next sync succeeds
  while the disk holds zeros. Instead the commit's bytes, which the cache still holds, are written to a new file, which is
  synced and renamed over the old one.
- So a power cut can tear only the newest commit, which was never acknowledged, and a checkpoint that another tool made, which
  only summarises commits. Both are moved aside, not deleted. A torn commit with whole commits after it is damage that no
  crash makes: it is refused by name.

Called by the store and by the holder of the run's lease; torn checkpoints are also moved aside by readers that cannot open the
table. Object stores have no torn files.
"""

from __future__ import annotations

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
_CHECKPOINT = re.compile(r"\d{20}\.checkpoint\.parquet")

log = logging.getLogger(__name__)


def is_table(location: Location) -> bool:
    """There is a Delta table at the location."""
    return DeltaTable.is_deltatable(location.uri, storage_options=location.options)


def open_table(location: Location, version: int | None = None) -> DeltaTable:
    """The table at a version; default: the newest. A torn checkpoint is moved aside: the commits that it summarises are there.

    Raises:
        LogSchemaError: the newest commit is torn, which only the holder of the lease may put right.
    """

    def opened() -> DeltaTable:
        return DeltaTable(location.uri, version=version, storage_options=location.options)

    try:
        return opened()
    except DeltaError:
        if repair_checkpoints(location):
            return opened()
        for path in torn_commits(location):
            raise LogSchemaError(
                f"{path}: torn, as a power cut leaves a commit that was never acknowledged; the next start of the run, or "
                "`tc-ray log compact`, moves it aside"
            ) from None
        raise


def renew_commits(location: Location, versions: Iterable[int]) -> None:
    """Write commits anew, oldest first, and sync them with their names. Commits that are gone are left out.

    Raises:
        OSError: the disk does not take a commit, or what is read back is no commit: it is lost, and was never acknowledged.
    """
    if location.local is None:
        return
    for version in versions:
        path = location.path(commit_name(version))
        try:
            content, found = path.read_bytes(), path.stat()
        except FileNotFoundError:  # removed by another tool
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
        # the time of a commit says when its removed files left the table
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def write_checkpoint(location: Location, table: DeltaTable) -> None:
    """Summarise the commits up to the table's version in one Parquet file of Delta's own, so that opening stays quick.

    A local checkpoint is made beside the table, from copies of the commits since the last one, and gets its name only when it
    is on the disk: a torn checkpoint makes a table unopenable, a missing one costs nothing.

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
    """Files of a transaction log that Delta reads to open the table at `version`."""
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


def repair(location: Location) -> list[str]:
    """Move torn files of the transaction log aside. For the holder of the lease.

    Returns:
        What was moved, in words; empty nearly always.

    Raises:
        LogSchemaError: a commit is damaged and later ones are whole.
    """
    moved = [_move(location, path, "a commit that was never acknowledged") for path in torn_commits(location)]
    return moved + repair_checkpoints(location)


def repair_checkpoints(location: Location) -> list[str]:
    """As `repair`, but only checkpoints, which a reader may do without."""
    folder = _log_folder(location)
    return [] if folder is None else [_move(location, path, what) for path, what in _torn_checkpoints(folder)]


def torn_commits(location: Location) -> list[Path]:
    """The newest commit, if it is torn.

    Raises:
        LogSchemaError: a commit is damaged and later ones are whole.
    """
    folder = _log_folder(location)
    if folder is None:
        return []
    newest = sorted(path for path in folder.iterdir() if _COMMIT.fullmatch(path.name))[-NEWEST:]
    torn: list[Path] = []
    for path in reversed(newest):
        try:
            parse_commit(int(path.name.split(".")[0]), path.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            if path != newest[-1]:
                raise LogSchemaError(
                    f"{path}: damaged commit ({error}) with whole commits after it: no crash does this; restore the file "
                    "from a backup"
                ) from None
            torn.append(path)
    return torn


def _log_folder(location: Location) -> Path | None:
    if location.local is None or not (location.local / LOG_FOLDER).is_dir():
        return None
    return location.path(LOG_FOLDER)


def _torn_checkpoints(folder: Path) -> list[tuple[Path, str]]:
    torn = []
    for path in folder.iterdir():
        if path.name == LAST_CHECKPOINT:
            try:
                version = int(json.loads(path.read_bytes())["version"])
                next(folder.glob(f"{version:020d}.checkpoint*"))
            except (ValueError, KeyError, TypeError, StopIteration):
                torn.append((path, "the pointer to a checkpoint of the table"))
        elif _CHECKPOINT.fullmatch(path.name):
            try:
                pq.ParquetFile(path).read()
            except (pa.ArrowException, OSError):
                torn.append((path, "a checkpoint of the table"))
    if any(_CHECKPOINT.fullmatch(path.name) for path, _ in torn):
        pointer = folder / LAST_CHECKPOINT
        if pointer.exists() and pointer not in [path for path, _ in torn]:
            torn.append((pointer, "the pointer to a torn checkpoint"))
    return torn


def _move(location: Location, path: Path, what: str) -> str:
    aside = location.path(TORN_FOLDER)
    aside.mkdir(parents=True, exist_ok=True)
    target = aside / path.name
    number = 0
    while target.exists():
        number += 1
        target = aside / f"{path.name}.{number}"
    size = path.stat().st_size
    os.rename(path, target)
    sync(aside)
    sync(path.parent)
    moved = f"{path.name} ({what}, torn at {size} bytes) moved to {TORN_FOLDER}"
    log.warning("%s: %s", location, moved)
    return moved
