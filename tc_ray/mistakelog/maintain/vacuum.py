"""Vacuum: removes the files in the table's folder that no reader can want.

A file stays while it is in the newest version or in a version that a reader's lease holds, and for `grace_seconds` after it left
the table: readers without a lease (DuckDB, Spark) need that time. A file that was never committed stays for `orphan_seconds`
after its last change, and while its name says that the live attempt wrote it: its writer may wait for space and commit it later.
Files of other names that the table never held are left alone: nobody knows whose they are.

Why a reader that is choosing a version is safe, however slow it is. `look` lists the leases at a moment when the newest version is
N, and only files that left the table with N or before are removed. A reader first takes a lease on the version that it knows, K,
and all later ones; then it looks for the newest version, V >= K; then it turns the lease into one on V. If vacuum sees the first
lease, it removes only what left the table with K or before: no version from K on holds it, since names are not used twice. If
vacuum sees the second lease, it keeps V's files. If it sees neither, the reader chose its version after vacuum listed the leases,
so V >= N and its files are kept. Commits may follow between `look` and `remove`: they never add a file that has left.

Why not `DeltaTable.vacuum(keep_versions=...)`: see docs/decisions.md.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from tc_ray.mistakelog.read.reader_lease import held_versions
from tc_ray.mistakelog.table.commits import commit_name
from tc_ray.mistakelog.table.data_file import TEMPORARY_SUFFIX
from tc_ray.mistakelog.table.errors import LogFullError
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Entry, Location
from tc_ray.mistakelog.table.store import LogStore

_OURS = re.compile(r"rounds-\d{8}-.*\.parquet(\.tmp)?$")
_ATTEMPT = re.compile(r"-rank\d+-a(\d+)-\d{6}(-t\d+)?\.parquet(\.tmp)?$")
_RECENT = 2.0


@dataclass
class Vacuum:
    """What one vacuum found."""

    location: str
    removed: list[Entry] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    """Versions that readers hold."""
    recent_bytes: int = 0
    """Of data files written in the last two `grace_seconds`: removed files wait that long, then for a vacuum or a reader."""
    disk_bytes: int = 0
    """Of all data files that stay."""
    seen: set[str] = field(default_factory=set)
    """Names of all data files that were there, for counting on from `disk_bytes`."""

    def lines(self) -> list[str]:
        """For a terminal."""
        size = sum(entry.size for entry in self.removed)
        lines = [f"{self.location}: {len(self.removed)} files ({size:,} bytes) removed, {self.disk_bytes:,} bytes left"]
        if self.held:
            lines.append(f"versions held by readers: {', '.join(map(str, self.held))}")
        return lines


def look(store: LogStore, *, orphan_seconds: float, grace_seconds: float, live_attempt: int | None) -> Vacuum:
    """Decide what to remove; `remove` does it.

    Args:
        store: of the one committer, at the newest version.
        orphan_seconds: age since their last change at which files that were never committed are removed.
        grace_seconds: how long files that left the table stay.
        live_attempt: of the run at work: its uncommitted files stay; None: no run is at work.

    Raises CommitConflictError or LeaseLostError if another process has committed.
    """
    place = store.location
    entries = place.list(recursive=False)
    # after the listing: whatever was committed by then is known below, so no listed file of another committer counts as an
    # orphan, even if this process was stopped for hours and has lost its lease meanwhile
    store.confirm()
    now = place.now()
    leases = held_versions(place, now)
    result = Vacuum(str(place), held=sorted({lease.version for lease in leases if not lease.onwards}))
    needed = {file.name for version in (store.version, *result.held) for file in store.files_at(version)}
    # a file that left the table with this version or before is in no version that a reader may choose, nor in one that a power
    # cut may bring back
    settled = min([store.durable, *(lease.version for lease in leases if lease.onwards)])
    fates = store.fates()
    # when a file left the table, by the disk's clock as all ages here; None if the commit is gone
    left_at = functools.cache(lambda version: place.modified(commit_name(version)))
    for entry in entries:
        if not entry.name.endswith((".parquet", ".parquet.tmp")):
            continue
        result.seen.add(entry.name.removesuffix(TEMPORARY_SUFFIX))
        if now - entry.modified < _RECENT * grace_seconds:
            result.recent_bytes += entry.size
        fate = fates.get(entry.name)
        if entry.name in needed:
            keep = True
        elif fate is not None:
            time_left = None if fate.left is None or fate.left > settled else left_at(fate.left)
            keep = time_left is None or time_left > now - grace_seconds
        else:
            young = now - entry.modified <= orphan_seconds
            keep = young or not _OURS.match(entry.name) or _in_progress(entry.name, live_attempt)
        if keep:
            result.disk_bytes += entry.size
        else:
            result.removed.append(entry)
    return result


def remove(location: Location, found: Vacuum) -> None:
    """Delete what `look` decided to remove."""
    for entry in found.removed:
        location.delete(entry.name)


def _in_progress(name: str, live_attempt: int | None) -> bool:
    found = _ATTEMPT.search(name)
    return live_attempt is not None and found is not None and int(found[1]) >= live_attempt


def vacuum_log(location: str | Path | Location, *, orphan_seconds: float, grace_seconds: float) -> Vacuum:
    """Vacuum a log that no run is writing (a run does it by itself).

    Raises:
        LeaseHeldError: a run, or another command, is at work on the log.
        LogFullError: the disk is full, and nothing here can be removed.
    """
    place = Location(location)

    def clean(lease: int | None, orphan_seconds: float) -> Vacuum:
        store = LogStore(place, lease=lease)
        found = look(store, orphan_seconds=orphan_seconds, grace_seconds=grace_seconds, live_attempt=None)
        remove(place, found)
        return found

    before: list[Entry] = []
    try:
        lease = RunLease.take(place, "tc-ray log vacuum")
    except LogFullError:
        # a lease needs some bytes. What has left the table can go without one: nobody commits it again
        before = clean(None, math.inf).removed
        lease = RunLease.take(place, "tc-ray log vacuum")
    with lease:
        result = clean(lease.number, orphan_seconds)
    result.removed = before + result.removed
    return result
