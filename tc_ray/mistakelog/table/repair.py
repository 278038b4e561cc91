"""What a power cut can leave in a local table's transaction log, put right before the next commit.

delta-rs does not bring its files to the disk. The store does so after each commit, before anything is acknowledged or built upon it,
and who takes a log up brings the newest ones there again (`LogStore.adopt`): the one before may have been killed in between. So after a
power cut only the newest commit, never acknowledged, can be torn, besides a checkpoint that another tool has made, which
only sums commits up. Both are moved aside, not deleted. A torn commit with whole ones after it is damage that no crash makes:
that is refused by name. Called by the holder of the run's lease; checkpoints also by readers that cannot open the table. Object
stores have no torn files.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.files import sync
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.commits import LOG_FOLDER, parse_commit
from tc_ray.mistakelog.table.location import Location

TORN_FOLDER = "_tc_ray/torn"
_COMMIT = re.compile(r"\d{20}\.json")
_CHECKPOINT = re.compile(r"\d{20}\.checkpoint\.parquet")
NEWEST = 8
"""Commits looked at, and brought to the disk again: one can be torn, the others show that it is the last."""

log = logging.getLogger(__name__)


def repair(location: Location) -> list[str]:
    """Move torn files of the transaction log aside.

    Returns:
        What was moved, in words; empty nearly always.

    Raises:
        LogSchemaError: a commit is damaged and later ones are whole.
    """
    told = [_move(location, path, "a commit that was never acknowledged") for path in torn_commits(location)]
    return told + repair_checkpoints(location)


def repair_checkpoints(location: Location) -> list[str]:
    """As `repair`, but only what sums commits up, and what anybody may do without."""
    folder = _log_folder(location)
    return [] if folder is None else [_move(location, path, what) for path, what in _torn_checkpoints(folder)]


def torn_commits(location: Location) -> list[Path]:
    """The newest commit, where it is torn.

    Raises:
        LogSchemaError: a commit is damaged and later ones are whole.
    """
    folder = _log_folder(location)
    return [] if folder is None else _torn_commits(folder)


def _log_folder(location: Location) -> Path | None:
    if location.local is None or not (location.local / LOG_FOLDER).is_dir():
        return None
    return location.path(LOG_FOLDER)


def _newest(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _COMMIT.fullmatch(path.name))[-NEWEST:]


def _torn_commits(folder: Path) -> list[Path]:
    newest = _newest(folder)
    torn: list[Path] = []
    for path in reversed(newest):
        try:
            parse_commit(int(path.name.split(".")[0]), path.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            if path != newest[-1]:
                raise LogSchemaError(
                    f"{path}: damaged commit ({error}) with whole ones after it: no crash does this; restore the file "
                    "from a backup"
                ) from None
            torn.append(path)
    return torn


def _torn_checkpoints(folder: Path) -> list[tuple[Path, str]]:
    torn = []
    for path in folder.iterdir():
        if path.name == "_last_checkpoint":
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
        pointer = folder / "_last_checkpoint"
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
    told = f"{path.name} ({what}, torn at {size} bytes) moved to {TORN_FOLDER}"
    log.warning("%s: %s", location, told)
    return told
