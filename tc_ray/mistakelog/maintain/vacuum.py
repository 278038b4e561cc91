"""Vacuum: removes the files in the table's folder that no reader can want.

A file stays while it is in the newest version or in a version that a reader's lease holds, and for `grace_seconds` after it left
the table: readers without a lease (DuckDB, Spark) need that time. A file that was never committed stays for `orphan_seconds`
after its last change, and while its name says that the live attempt wrote it: its writer may wait for space and commit it later.
Small leftovers of dead processes (leases, half-replaced files) are removed at the age of orphans. Files of other names that the
table never held are left alone: nobody knows whose they are.

Why a reader that is choosing a version is safe, however slow it is. `look` lists the leases at a moment when the newest version is
N, and only files that left the table with N or before are removed. A reader first takes a lease on the version that it knows, K,
and all later ones; then it looks for the newest version, V >= K; then it turns the lease into one on V. If vacuum sees the first
lease, it removes only what left the table with K or before: no version from K on holds it, since names are not used twice. If
vacuum sees the second lease, it keeps V's files. If it sees neither, the reader chose its version after vacuum listed the leases,
so V >= N and its files are kept. Commits may follow between `look` and `remove`: they never add a file that has left.

Why not `DeltaTable.vacuum(keep_versions=...)`: see docs/decisions.md. Called by maintenance and by `tc-ray log vacuum`.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.read.reader_lease import held_versions
from tc_ray.mistakelog.table.commits import LOG_FOLDER, commit_name
from tc_ray.mistakelog.table.data_file import TEMPORARY_SUFFIX
from tc_ray.mistakelog.table.errors import LogFullError
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Entry, Location
from tc_ray.mistakelog.table.store import LEASE_NUMBER, LogStore

log = logging.getLogger(__name__)

_OURS = re.compile(r"rounds-\d{8}-.*\.parquet(\.tmp)?$")
_ATTEMPT = re.compile(r"-rank\d+-a(\d+)-\d{6}(-t\d+)?\.parquet(\.tmp)?$")
_LEASE = re.compile(r"_tc_ray/lease-(\d+)\.json$")
# half-written small files and checkpoints, and what delta-rs stages its commits in
_STAGED = re.compile(r"(\.writing(/.*)?|\.json#\d+)$")
_RECENT = 2.0


@dataclass
class Vacuum:
    """What one vacuum found."""

    location: str
    dry_run: bool
    removed: list[Entry] = field(default_factory=list)
    """Removed, or with `dry_run` to be removed."""
    waiting: list[Entry] = field(default_factory=list)
    """Not (or not yet) in the table, and kept: for readers, or because they are young."""
    foreign: list[str] = field(default_factory=list)
    """Parquet files that tc-ray did not write and the table never held."""
    held: list[int] = field(default_factory=list)
    """Versions that readers hold."""
    looking: int = 0
    """Readers that are choosing a version; see the module."""
    recent_bytes: int = 0
    """Of data files written in the last two `grace_seconds`: removed files wait that long, then for a vacuum or a reader."""
    disk_bytes: int = 0
    """Of all data files that stay."""
    seen: set[str] = field(default_factory=set)
    """Names of all data files that were there, for counting on from `disk_bytes`."""

    def lines(self) -> list[str]:
        """For a terminal."""
        size = sum(entry.size for entry in self.removed)
        verb = "would be removed" if self.dry_run else "removed"
        lines = [f"{self.location}: {len(self.removed)} files ({size:,} bytes) {verb}, {self.disk_bytes:,} bytes left"]
        if self.waiting:
            size = sum(entry.size for entry in self.waiting)
            lines.append(f"{len(self.waiting)} files ({size:,} bytes) are not in the table but stay for now")
        if self.held:
            lines.append(f"versions held by readers: {', '.join(map(str, sorted(set(self.held))))}")
        if self.looking:
            lines.append(f"{self.looking} readers are about to choose a version: what left the table lately stays")
        return lines + [f"not ours, left alone: {name}" for name in self.foreign]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "location": self.location,
            "dry_run": self.dry_run,
            "removed": [entry.name for entry in self.removed],
            "removed_bytes": sum(entry.size for entry in self.removed),
            "waiting": [entry.name for entry in self.waiting],
            "foreign": self.foreign,
            "held_versions": sorted(set(self.held)),
            "looking": self.looking,
            "disk_bytes": self.disk_bytes,
        }


def look(
    store: LogStore,
    *,
    orphan_seconds: float,
    grace_seconds: float,
    live_attempt: int | None,
    staged: bool = True,
    dry_run: bool = False,
) -> Vacuum:
    """Decide what to remove; `remove` does it.

    Args:
        store: of the one committer, at the newest version.
        orphan_seconds: age since their last change at which files that were never committed are removed.
        grace_seconds: how long files that left the table stay.
        live_attempt: of the run at work: its uncommitted files stay; None: no run is at work.
        staged: also look for commits that a crash left half made: lists the transaction log, which only grows.
        dry_run: nothing will be removed, so no lease is needed.

    Raises:
        CommitConflictError, LeaseLostError: another process has committed.
    """
    place = store.location
    entries = place.list(recursive=False)
    aside = place.list("_tc_ray", recursive=True) + (place.list(LOG_FOLDER, recursive=False) if staged else [])
    # after the listing: whatever was committed by then is known below, so no listed file of another committer counts as an
    # orphan, even if this process was stopped for hours and has lost its lease meanwhile
    if not dry_run:
        store.confirm()
    now = _disk_time(place, dry_run)
    result = Vacuum(str(place), dry_run)
    needed, settled = _needed(store, result, now)
    fates = store.fates()
    # when a file left the table, by the disk's clock as all ages here; None if the commit is gone
    left_at = functools.cache(lambda version: place.modified(commit_name(version)))
    for entry in aside:
        lease = _LEASE.match(entry.name)
        leftover = _STAGED.search(entry.name) or (lease and int(lease[1]) != store.number(LEASE_NUMBER))
        if leftover and now - entry.modified > orphan_seconds:
            result.removed.append(entry)
    for entry in entries:
        if not entry.name.endswith((".parquet", ".parquet.tmp")):
            continue
        result.seen.add(entry.name.removesuffix(TEMPORARY_SUFFIX))
        if now - entry.modified < _RECENT * grace_seconds:
            result.recent_bytes += entry.size
        fate = fates.get(entry.name)
        keep = waits = True
        if entry.name in needed:
            waits = False
        elif fate is not None:
            time_left = None if fate.left is None or fate.left > settled else left_at(fate.left)
            keep = time_left is None or time_left > now - grace_seconds
        elif not _OURS.match(entry.name):
            result.foreign.append(entry.name)
            waits = False
        else:
            keep = now - entry.modified <= orphan_seconds or _in_progress(entry.name, live_attempt)
        if not keep:
            result.removed.append(entry)
            continue
        result.disk_bytes += entry.size
        if waits:
            result.waiting.append(entry)
    if not dry_run:
        store.forget(set(fates) - {entry.name for entry in entries} - needed)
    return result


def remove(location: Location, found: Vacuum) -> None:
    """Delete what `look` decided to remove."""
    for entry in found.removed:
        location.delete(entry.name)


def _disk_time(location: Location, dry_run: bool) -> float:
    """Now, by the clock that stamps the files."""
    try:
        return location.now()
    except OSError:
        if dry_run:  # a read-only location
            return time.time()
        raise


def _needed(store: LogStore, result: Vacuum, now: float) -> tuple[set[str], int]:
    """Files of the newest version and of those that readers hold, and the last settled version.

    A file that left the table with the settled version or before is in no version that a reader may choose, nor in one that a
    power cut may bring back. -1 if the files of a held version are unknown.
    """
    needed = {file.name for file in store.files()}
    leases = held_versions(store.location, now, forget=not result.dry_run)
    result.held = [lease.version for lease in leases if not lease.onwards]
    result.looking = len(leases) - len(result.held)
    settled = min([store.durable, *(lease.version for lease in leases if lease.onwards)])
    for version in sorted(set(result.held)):
        try:
            needed |= {file.name for file in store.files_at(version)}
        except (DeltaError, OSError, ValueError) as error:
            log.warning(
                "%s: version %d is held by a reader but cannot be read, so no file that was ever in the table is removed: %s",
                store.location,
                version,
                error,
            )
            settled = -1
    return needed, settled


def _in_progress(name: str, live_attempt: int | None) -> bool:
    found = _ATTEMPT.search(name)
    return live_attempt is not None and found is not None and int(found[1]) >= live_attempt


def vacuum_log(
    location: str | Path | Location, *, orphan_seconds: float, grace_seconds: float, dry_run: bool = False
) -> Vacuum:
    """Vacuum a log that no run is writing (a run does it by itself).

    Raises:
        LeaseHeldError: a run, or another command, is at work on the log (not with `dry_run`, which changes nothing).
        LogFullError: the disk is full, and nothing here can be removed.
        LogSchemaError: no Mistake Log there.
    """
    place = Location(location)

    def clean(lease: int | None, orphan_seconds: float = orphan_seconds) -> Vacuum:
        store = LogStore(place, lease=lease)
        found = look(
            store, orphan_seconds=orphan_seconds, grace_seconds=grace_seconds, live_attempt=None, dry_run=dry_run
        )
        if not dry_run:
            remove(place, found)
        return found

    if dry_run:
        return clean(None)
    before: list[Entry] = []
    try:
        lease = RunLease.take(place, "tc-ray log vacuum")
    except LogFullError:
        # a lease needs some bytes. What has left the table can go without one: nobody commits it again
        before = clean(None, orphan_seconds=math.inf).removed
        lease = RunLease.take(place, "tc-ray log vacuum")
    with lease:
        result = clean(lease.number)
    result.removed = before + result.removed
    return result
