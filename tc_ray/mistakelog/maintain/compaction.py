"""Compaction: small files of a log become large ones with the same rows in the same order.

Invariant: a merge is one commit that removes the parts and adds the whole, marked as no change of data. Every part is checked
against its CRC-32 before its rows are copied, so damage is found and never gets a fresh checksum. A merge is optimistic: the file
is written without a lock, while other commits go on, and committed only if all its parts are still in the table.
Only rounds that no restart of the Pilot takes back are merged, so that fencing seldom cuts a merged file. What is merged
grows at least twofold, so a row is copied at most log2(target / smallest file) times. Why not `DeltaTable.optimize.compact`: see
docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.table.data_file import DataFile, ParquetPart, compression_of
from tc_ray.mistakelog.table.errors import CommitConflictError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore, StoredFile

_FEWEST_FILES = 8
_COPY = -1
"""Sequence of a file that stands in for others: no commit of a writer."""


def merge_plan(
    files: Sequence[StoredFile],
    target_bytes: int,
    safe_round: int,
    *,
    most_rounds: int | None = None,
) -> list[list[StoredFile]]:
    """Groups of files to merge, oldest first. A merge has to pay: half of the target together, or all that `most_rounds` allows,
    or `_FEWEST_FILES` files of which none is more than half.

    Args:
        files: of the table, in any order.
        target_bytes: length that files are merged up to; files of half of it are large enough already.
        safe_round: last round that no restart of the Pilot takes back.
        most_rounds: most rounds that a merged file may span: it leaves the log as a whole, with its newest round.

    Returns:
        Groups of at least two neighbours in the order of rounds, each of at most `target_bytes` together.
    """
    groups: list[list[StoredFile]] = []
    group: list[StoredFile] = []

    def close(complete: bool = False) -> None:
        nonlocal group
        total, largest = sum(file.bytes for file in group), max((file.bytes for file in group), default=0)
        pays = complete or 2 * total >= target_bytes or (len(group) >= _FEWEST_FILES and 2 * largest <= total)
        if len(group) > 1 and pays:
            groups.append(group)
        group = []

    for file in sorted(files, key=lambda file: (file.round_min, file.round_max, file.name)):
        if 2 * file.bytes >= target_bytes or file.round_max > safe_round:
            close()
            continue
        if group and most_rounds is not None and file.round_max - group[0].round_min >= most_rounds:
            close(complete=True)
        if sum(member.bytes for member in group) + file.bytes > target_bytes:
            close()
        group.append(file)
    close()
    return groups


def write_copy(
    store: LogStore,
    group: Sequence[StoredFile],
    name: str,
    *,
    watermark: int | None = None,
) -> DataFile:
    """Write the rows of a group, in its order, to one new file, to be committed with the group as `remove`.

    In memory are one file of the group at a time, and a row group. Pages are compressed as those of the group's first file.

    Args:
        watermark: leave out the rounds after it.

    Raises BadFileError, OSError: a file of the group is damaged, or there is no space; nothing was written.
    """
    part: ParquetPart | None = None
    try:
        for file in group:
            rows = store.read(file)
            if part is None:
                codec = compression_of(store.location, file.name)
                part = ParquetPart(store.location, name, codec, store.metadata.to_configuration())
            part.write(rows if watermark is None else rows.filter(pc.field("round") <= watermark))
        assert part is not None, "a group has files"
        done = part.finish()
    except BaseException:
        if part is not None:
            part.abort()
        raise
    last = max(file.round_max for file in group)
    return DataFile(
        name,
        part.rows,
        done.size,
        round_min=min(file.round_min for file in group),
        round_max=last if watermark is None else watermark,
        rank=min(file.rank for file in group),
        attempt=min(file.attempt for file in group),
        sequence=_COPY,
        crc32=done.crc32,
    )


def merge(
    store: LogStore, group: Sequence[StoredFile], turn: Callable[[], AbstractContextManager[Mapping[str, int]]]
) -> DataFile:
    """Replace a group by one file of the same rows.

    Args:
        store: of the one committer; while the file is written it may go on to other versions.
        turn: a context in which nobody else uses `store`, which is then at the newest version; gives the numbers of the commit.

    Raises:
        BadFileError, OSError: see `write_copy`.
        CommitConflictError: a file of the group has left the table, or another process committed; the merged file is removed.
    """
    first, last = min(file.round_min for file in group), max(file.round_max for file in group)
    name = f"rounds-{first:08d}-{last:08d}-merged-{uuid.uuid4().hex[:12]}.parquet"
    merged = write_copy(store, group, name)
    try:
        with turn() as numbers:
            left = {file.name for file in group} - {file.name for file in store.files()}
            if left:
                raise CommitConflictError(f"{store.location}: {min(left)} left the table while it was merged")
            store.commit(add=[merged], remove=group, numbers=numbers, note={"kind": "merge"}, data_change=False)
    except BaseException as error:
        with contextlib.suppress(OSError, DeltaError):
            # An error does not say that the commit was not made: only a file that is in no version is removed, and not from an
            # object store that the commit may still reach (vacuum removes it later). Looked up beside `store`, which must stay
            # at the version that its owner knows: that shows a second committer.
            decided = isinstance(error, CommitConflictError) or not _may_arrive_late(store.location)
            if decided and name not in LogStore(store.location).fates():
                store.location.delete(name)
        raise
    return merged


def _may_arrive_late(location: Location) -> bool:
    return location.local is None
