"""Maintenance of a growing log: removes what nobody reads, retires old files, merges small ones.

Invariants:

- The work of one call is bounded: a vacuum when one is due, one commit that retires, one merge of at most `file_bytes`.
- Commits do not wait for it. Only decisions and commits are made in the committer's turn (its lock); files are removed, and
  merged files written, outside of it. A merge whose parts left the table meanwhile is dropped.
- It costs the run nothing but time: a full disk, a store that does not answer or a second committer is logged, and the work is
  tried again later. A damaged file is quarantined. Only a lost lease is an error.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import pyarrow as pa
from deltalake.exceptions import DeltaError

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.maintain.compaction import merge, merge_plan
from tc_ray.mistakelog.maintain.quarantine import set_aside
from tc_ray.mistakelog.maintain.vacuum import Vacuum, look, remove
from tc_ray.mistakelog.table.data_file import BadFileError, DataFile
from tc_ray.mistakelog.table.errors import CommitConflictError
from tc_ray.mistakelog.table.store import LogStore, StoredFile

log = logging.getLogger(__name__)

_VACUUM_SECONDS = (0.2, 60.0)
_SAY_AGAIN_SECONDS = 600.0
_LEAST_PARTS = 8


@dataclass(frozen=True)
class Position:
    """How far the run is."""

    numbers: Mapping[str, int]
    """As for `LogStore.commit`, in each commit made here."""
    safe_round: int
    """Last round that no restart of the Pilot takes back: that of its newest checkpoint."""
    copilot_round: int | None
    """Last round consumed by the Copilot; None: there is no Copilot."""
    attempt: int
    """Of the run at work."""


def retire(
    files: Sequence[StoredFile], position: Position, limits: LogSection, buffer_rounds: int, reserved_bytes: int
) -> list[StoredFile]:
    """Retention: the files to remove from the table, oldest first. A pure policy.

    Whole files leave. Whatever the limits say, a file stays while it holds a round that the Copilot has not consumed, one of the
    `buffer_rounds` before its position (a restarted Copilot reads those again), or a round after `safe_round`.

    `max_bytes` bounds the bytes on the disk. Files that left the table stay there for `vacuum_grace_seconds`, then as long as a
    reader holds their version. So bytes are reserved for them: as many as were written in the last two grace times, because in a
    steady state as many leave as are written. (Counting the waiting files themselves would remove more and more: each removal
    makes more files wait.) With the headroom for what is written next, at most half of the limit is reserved.

    Args:
        files: of the table, in any order.
        buffer_rounds: that the Copilot draws from.
        reserved_bytes: for files that wait for their removal, and for what is written before the next call.
    """
    needed_from = position.safe_round + 1
    if position.copilot_round is not None:
        needed_from = min(needed_from, position.copilot_round - buffer_rounds + 1)
    newest = max((file.round_max for file in files), default=0)
    unwanted_to = newest - limits.keep_rounds if limits.keep_rounds is not None else 0
    live = allowed = sum(file.bytes for file in files)
    if limits.max_bytes is not None:
        allowed = max(limits.max_bytes - reserved_bytes, limits.max_bytes // 2)
    chosen = []
    for file in sorted(files, key=lambda file: (file.round_max, file.name)):
        if file.round_max >= needed_from or (file.round_max > unwanted_to and live <= allowed):
            break
        chosen.append(file)
        live -= file.bytes
    return chosen


@dataclass
class Maintained:
    """What one call did."""

    merged: list[StoredFile] = field(default_factory=list)
    """Files that became one."""
    merge: DataFile | None = None
    retired: list[StoredFile] = field(default_factory=list)
    vacuum: Vacuum | None = None
    bad: list[BadFileError] = field(default_factory=list)
    """Damaged files that were met and quarantined."""


class Maintenance:
    """Maintenance of one log by its one committer.

    Args:
        store: the committer's own.
        settings: what the log is kept to.
        buffer_rounds: rounds behind the Copilot's position that it reads again after a restart.
        turn: a context in which nobody else uses `store`, which is then at the newest version.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        store: LogStore,
        settings: LogSection,
        buffer_rounds: int,
        turn: Callable[[], AbstractContextManager[Position]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._settings, self._buffer_rounds = store, settings, buffer_rounds
        self._turn, self._clock = turn, clock
        self._vacuum_due = self._clock()
        self._disk: Vacuum | None = None
        self._said: dict[str, float] = {}

    def maintain(self, *, merge: bool = True) -> Maintained:
        """Do what is due. Not to be called by two threads at once. Raises LeaseLostError.

        Args:
            merge: False: only what frees space, nothing that needs some first.
        """
        done = Maintained()
        try:
            self._vacuum(done)  # first: it makes space, and retention needs to know what is on the disk
            with self._turn() as position:
                self._retire(done, position)
                group = self._next_merge(position) if merge and self._settings.compact else []
            if group:
                self._merge(done, group)
        except CommitConflictError as error:
            log.info("maintenance is put off: %s", error)
        except (OSError, DeltaError, pa.ArrowException) as error:
            self._say(type(error).__name__, f"maintenance is put off: {error}")
        return done

    def _vacuum(self, done: Maintained) -> None:
        if self._clock() < self._vacuum_due:
            return
        settings = self._settings
        with self._turn() as position:
            done.vacuum = self._disk = look(
                self._store,
                orphan_seconds=settings.orphan_seconds,
                grace_seconds=settings.vacuum_grace_seconds,
                live_attempt=position.attempt,
            )
        remove(self._store.location, done.vacuum)
        if done.vacuum.removed:
            log.info("%s", done.vacuum.lines()[0])
        shortest, longest = _VACUUM_SECONDS
        self._vacuum_due = self._clock() + min(max(settings.vacuum_grace_seconds / 4, shortest), longest)

    def _disk_bytes(self, files: list[StoredFile]) -> int:
        """On the disk now: what the last vacuum left, and what was committed since."""
        assert self._disk is not None
        return self._disk.disk_bytes + sum(file.bytes for file in files if file.name not in self._disk.seen)

    def _retire(self, done: Maintained, position: Position) -> None:
        settings, limit = self._settings, self._settings.max_bytes
        if self._disk is None or (settings.keep_rounds is None and limit is None):
            return
        files = self._store.files()
        reserved_bytes = self._disk.recent_bytes + settings.file_bytes
        done.retired = retire(files, position, settings, self._buffer_rounds, reserved_bytes)
        on_disk = self._disk_bytes(files)
        if done.retired:
            self._store.commit(remove=done.retired, numbers=position.numbers, note={"kind": "retire"})
        if limit is not None and on_disk > limit:
            copilot = "" if position.copilot_round is None else f"the Copilot is at round {position.copilot_round}, "
            self._say(
                "max_bytes",
                f"log.max_bytes {limit:,}, but {on_disk:,} bytes are on the disk: rounds that the Copilot or a restart may read "
                f"stay ({copilot}the last checkpoint at round {position.safe_round}), and files that left the log wait for "
                "log.vacuum_grace_seconds or for readers of older versions",
            )

    def _next_merge(self, position: Position) -> list[StoredFile]:
        """The oldest group of files that is worth merging; empty: none."""
        settings = self._settings
        files = self._store.files()
        # files are retired whole: with a limit on the log, one of them may only be a small part of it
        target, most_rounds = settings.file_bytes, None
        if settings.max_bytes is not None:
            target = min(target, max(settings.max_bytes // _LEAST_PARTS, 1))
        if settings.keep_rounds is not None:
            most_rounds = max(settings.keep_rounds // _LEAST_PARTS, 1)
        plan = merge_plan(files, target, position.safe_round, most_rounds=most_rounds)
        if plan and settings.max_bytes is not None and self._disk is not None:
            # the copy needs space beside what is written until the next vacuum makes some
            written = settings.file_bytes + self._disk.recent_bytes // 4
            if self._disk_bytes(files) + sum(file.bytes for file in plan[0]) + written > settings.max_bytes:
                return []
        return plan[0] if plan else []

    def _merge(self, done: Maintained, group: list[StoredFile]) -> None:
        @contextlib.contextmanager
        def turn() -> Iterator[Mapping[str, int]]:
            with self._turn() as position:
                yield position.numbers

        try:
            done.merge = merge(self._store, group, turn)
            done.merged = group
        except BadFileError as error:
            done.bad.append(error)
            with turn() as numbers:
                set_aside(self._store, [error], numbers=numbers)

    def _say(self, what: str, text: str) -> None:
        if self._clock() >= self._said.get(what, float("-inf")):
            self._said[what] = self._clock() + _SAY_AGAIN_SECONDS
            log.warning("%s: %s", self._store.location, text)
