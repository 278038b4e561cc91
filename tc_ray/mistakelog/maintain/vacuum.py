"""Vacuum: files in the table's folder that no reader can want are removed.

A file stays while it is in the newest version, in a version that a reader's lease holds, or left the table less than
`grace_seconds` ago. A file that was never committed stays for `orphan_seconds` from its last change, and while its name says that
the current attempt wrote it and a run is at work: its writer may be waiting for space, and commits it later.

Why a reader that is just looking is safe, however slow it is. The caller is the one committer and does not commit meanwhile, so
the version it stands at, N, stays the newest until it is done. A reader takes a lease on the version it knows, K, and all later ones,
looks for the newest, V, which is K or later, and then makes it a lease on V. Where vacuum sees the first lease, only what left the
table with K or before goes: no version from K on has it, since names are not used twice. Where it sees the second, V's files stay.
Where it sees neither, the reader looked after vacuum had read the leases: V is N, whose files stay, or a later one. (So readers
that look all the time do not keep vacuum from its work, as they would if they held everything.) `grace_seconds` is for readers without a lease. Who opens an older version by number finds its files or is told that they
are gone.

Small leftovers of processes that died (leases never taken, files half replaced) go by the same age as orphans.

The library's own vacuum counts in hours and knows no leases. Files of other names than ours that were never in the table
are left alone: nobody knows whose they are. Called by the Ledger after commits and by `tc-ray log vacuum`.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.read.reader_lease import held_versions
from tc_ray.mistakelog.table.commits import LOG_FOLDER, Fate, commit_name
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
_WHAT = "tc-ray log vacuum"


@dataclass
class Vacuum:
    """What one vacuum found and removed."""

    location: str
    dry_run: bool
    removed: list[Entry] = field(default_factory=list)
    """Removed, or with `dry_run` to be removed."""
    waiting: list[Entry] = field(default_factory=list)
    """No longer (or not yet) in the table, and kept: for readers, or because they are young."""
    foreign: list[str] = field(default_factory=list)
    """Parquet files that tc-ray did not write and the table never held."""
    held: list[int] = field(default_factory=list)
    """Versions that readers hold; see `looking`."""
    looking: int = 0
    """Readers that were about to choose a version: nothing was removed that they may find."""
    recent_bytes: int = 0
    """Of data files written in the last two `grace_seconds`: files wait that long, then for a vacuum or a reader."""
    disk_bytes: int = 0
    """Of all data files that are still there."""
    seen: set[str] = field(default_factory=set)
    """Names of all data files that were there, for counting on from `disk_bytes`."""

    def lines(self) -> list[str]:
        """For a terminal."""
        size = sum(entry.size for entry in self.removed)
        verb = "would be removed" if self.dry_run else "removed"
        told = [f"{self.location}: {len(self.removed)} files ({size:,} bytes) {verb}, {self.disk_bytes:,} bytes left"]
        if self.waiting:
            size = sum(entry.size for entry in self.waiting)
            told.append(f"{len(self.waiting)} files ({size:,} bytes) left the table but stay for now")
        if self.held:
            told.append(f"versions held by readers: {', '.join(map(str, sorted(set(self.held))))}")
        if self.looking:
            told.append(
                f"{self.looking} readers are about to choose a version: what has left the table only lately stays"
            )
        told += [f"not ours, left alone: {name}" for name in self.foreign]
        return told

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


def clean(
    store: LogStore,
    *,
    orphan_seconds: float,
    grace_seconds: float,
    live_attempt: int | None,
    staged: bool = True,
    dry_run: bool = False,
) -> Vacuum:
    """One vacuum; the caller holds the run's lease, so that `store` stands at the newest version.

    Args:
        store: of one who commits: under its lease, or where nobody else is at work.
        orphan_seconds: age, since their last change, at which files that were never committed are removed.
        grace_seconds: how long files that left the table stay.
        live_attempt: of the run at work: its uncommitted files stay; None: no run is.
        staged: look for commits that a crash left half made, too: lists the transaction log, whose files stay for good.
        dry_run: remove nothing.

    Raises:
        CommitConflictError, LeaseLostError: another process has committed; nothing was removed.
    """
    place = store.location
    entries = place.list(recursive=False)
    aside = place.list("_tc_ray", recursive=True) + (place.list(LOG_FOLDER, recursive=False) if staged else [])
    # after the look at the folder: what was committed by then is known below, so nothing of it is taken for an orphan, whoever
    # committed it, even if this process was stopped for hours and has lost its lease meanwhile
    if not dry_run:
        store.confirm()
    disk_now = _disk_time(place, dry_run)
    needed = {file.name for file in store.files()}
    result = Vacuum(str(place), dry_run)
    settled = _hold(store, needed, result, disk_now)
    fates = store.fates()
    # when a file left the table, by the clock of the disk as all ages here; None where the commit is gone
    times = functools.cache(lambda version: place.modified(commit_name(version)))
    for entry in aside:
        lease = _LEASE.match(entry.name)
        left = _STAGED.search(entry.name) or (lease and int(lease[1]) != store.number(LEASE_NUMBER))
        if left and disk_now - entry.modified > orphan_seconds:
            _remove(place, entry, result)
    for entry in entries:
        if not entry.name.endswith((".parquet", ".parquet.tmp")):
            continue
        result.seen.add(entry.name.removesuffix(TEMPORARY_SUFFIX))
        if disk_now - entry.modified < _RECENT * grace_seconds:
            result.recent_bytes += entry.size
        if entry.name in needed:
            result.disk_bytes += entry.size
        elif (fate := fates.get(entry.name)) is not None:
            if _has_left(fate, times, disk_now - grace_seconds, settled):
                _remove(place, entry, result)
            else:
                _keep(entry, result)
        elif not _OURS.match(entry.name):
            result.foreign.append(entry.name)
            result.disk_bytes += entry.size
        elif disk_now - entry.modified > orphan_seconds and not _in_progress(entry.name, live_attempt):
            _remove(place, entry, result)
        else:
            _keep(entry, result)
    if not dry_run:
        store.forget(set(fates) - {entry.name for entry in entries} - needed)
    return result


def _disk_time(location: Location, dry_run: bool) -> float:
    """Now, by the clock that stamps the files, if it can be had."""
    try:
        return location.now()
    except OSError:
        if dry_run:  # a read-only location: nothing is removed by this
            return time.time()
        raise


def _hold(store: LogStore, needed: set[str], result: Vacuum, disk_now: float) -> int:
    """Add to `needed` the files of the versions that readers hold.

    Returns:
        The last version that a file may have left with to be in none of them, nor in a version that a power cut may bring
        back; -1 where the files of a version cannot be told.
    """
    leases = held_versions(store.location, disk_now, forget=not result.dry_run)
    result.held = [lease.version for lease in leases if not lease.onwards]
    result.looking = len(leases) - len(result.held)
    settled = min([store.durable, *(lease.version for lease in leases if lease.onwards)])
    for version in sorted(set(result.held)):
        try:
            needed |= {file.name for file in store.files_at(version)}
        except (DeltaError, OSError, ValueError) as error:
            log.warning(
                "%s: version %d is held by a reader but cannot be read, so nothing is removed that was ever in the table: %s",
                store.location,
                version,
                error,
            )
            settled = -1
    return settled


def _has_left(fate: Fate, times: Callable[[int], float | None], until: float, settled: int) -> bool:
    """The file left the table by the time `until`, with the version `settled` or before."""
    if fate.left is None or fate.left > settled:
        return False
    left_at = times(fate.left)
    return left_at is not None and left_at <= until


def _in_progress(name: str, live_attempt: int | None) -> bool:
    found = _ATTEMPT.search(name)
    return live_attempt is not None and found is not None and int(found[1]) >= live_attempt


def _keep(entry: Entry, result: Vacuum) -> None:
    result.waiting.append(entry)
    result.disk_bytes += entry.size


def _remove(location: Location, entry: Entry, result: Vacuum) -> None:
    result.removed.append(entry)
    if not result.dry_run:
        location.delete(entry.name)


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

    def done(lease: RunLease | None, orphan_seconds: float = orphan_seconds) -> Vacuum:
        return clean(
            LogStore(place, lease=None if lease is None else lease.number),
            orphan_seconds=orphan_seconds,
            grace_seconds=grace_seconds,
            live_attempt=None,
            dry_run=dry_run,
        )

    if dry_run:
        return done(None)
    before: list[Entry] = []
    try:
        lease = RunLease.take(place, _WHAT)
    except LogFullError:
        # A lease needs some bytes. What has left the table can go without one: nobody takes it in again
        before = done(None, orphan_seconds=math.inf).removed
        lease = RunLease.take(place, _WHAT)
    with lease:
        result = done(lease)
    result.removed = before + result.removed
    return result
