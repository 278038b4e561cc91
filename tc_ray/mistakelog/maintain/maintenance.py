"""Upkeep of a growing log: after a commit the Ledger merges small files, retires old ones and removes what nobody reads.

Invariant: the work of one call is bounded (one merge of at most `file_bytes`, one commit that retires, one vacuum no more often than
the grace time asks for), and it never costs the run anything but time: a full disk, a store that does not answer or a damaged
file is said in the log and tried again later. Only a second committer is an error of the caller's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.maintain.compaction import merge, merge_plan
from tc_ray.mistakelog.maintain.limits import Upkeep
from tc_ray.mistakelog.maintain.retention import Standing, retire
from tc_ray.mistakelog.maintain.vacuum import Vacuum, clean
from tc_ray.mistakelog.table.data_file import BadFileError, DataFile
from tc_ray.mistakelog.table.store import LogStore, StoredFile

log = logging.getLogger(__name__)

_VACUUM_SECONDS = (0.2, 60.0)
_SAY_AGAIN_SECONDS = 600.0
_LEAST_PARTS = 8


@dataclass
class Maintained:
    """What one call did."""

    merged: list[StoredFile] = field(default_factory=list)
    """Files that became one."""
    merge: DataFile | None = None
    retired: list[StoredFile] = field(default_factory=list)
    vacuum: Vacuum | None = None
    bad: list[BadFileError] = field(default_factory=list)
    """Damaged files that were met; they stay in the table until somebody quarantines them."""

    @property
    def changed(self) -> bool:
        """The table has new versions."""
        return self.merge is not None or bool(self.retired)


class Maintenance:
    """Upkeep of one log by its one committer.

    Args:
        store: the committer's own.
        upkeep: what the log is kept to.
        clock: seconds, monotonic.
    """

    def __init__(self, store: LogStore, upkeep: Upkeep, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._upkeep, self._clock = store, upkeep, clock
        self._vacuum_due = self._staged_due = self._clock()
        self._disk: Vacuum | None = None
        self._said: dict[str, float] = {}
        self._bad: set[str] = set()

    def maintain(
        self,
        *,
        numbers: Mapping[str, int],
        safe_round: int,
        copilot_round: int | None,
        attempt: int,
        merge: bool = True,
    ) -> Maintained:
        """Do what is due.

        Args:
            numbers: as for `LogStore.commit`, in each commit made here.
            safe_round: last round that no restart of the Pilot takes back: that of its newest checkpoint.
            copilot_round: last round consumed by the Copilot; None: there is no Copilot.
            attempt: of the run at work.
            merge: False: only what frees space, nothing that needs some first.

        Raises:
            CommitConflictError: another process commits to this log.
        """
        done = Maintained()
        try:
            self._vacuum(done, attempt)  # first: what it frees is not missed, and its figures are fresh
            self._retire(done, numbers, safe_round, copilot_round)
            if self._upkeep.compact and merge:
                self._merge(done, numbers, safe_round)
        except (OSError, DeltaError, pa.ArrowException) as error:
            self._say(type(error).__name__, f"upkeep is put off: {error}")
        return done

    def _vacuum(self, done: Maintained, attempt: int) -> None:
        if self._clock() < self._vacuum_due:
            return
        limits = self._upkeep
        staged = self._clock() >= self._staged_due
        done.vacuum = self._disk = clean(
            self._store,
            orphan_seconds=limits.orphan_seconds,
            grace_seconds=limits.grace_seconds,
            live_attempt=attempt,
            staged=staged,
        )
        if staged:  # none is old enough sooner, and the list of commits grows as long as the run
            self._staged_due = self._clock() + limits.orphan_seconds
        shortest, longest = _VACUUM_SECONDS
        self._vacuum_due = self._clock() + min(max(limits.grace_seconds / 4, shortest), longest)
        if done.vacuum.removed:
            log.info("%s", done.vacuum.lines()[0])

    def _disk_bytes(self, files: list[StoredFile]) -> int:
        """On the disk now: as the last vacuum saw it, and what was committed since."""
        assert self._disk is not None
        return self._disk.disk_bytes + sum(file.bytes for file in files if file.name not in self._disk.seen)

    def _retire(self, done: Maintained, numbers: Mapping[str, int], safe_round: int, copilot_round: int | None) -> None:
        limits = self._upkeep
        if self._disk is None or (limits.keep_rounds is None and limits.max_bytes is None):
            return
        files = self._store.files()
        standing = Standing(
            safe_round=safe_round,
            copilot_round=copilot_round,
            buffer_rounds=limits.buffer_rounds,
            recent_bytes=self._disk.recent_bytes,
            headroom_bytes=limits.file_bytes,
            disk_bytes=self._disk_bytes(files),
        )
        answer = retire(files, standing, keep_rounds=limits.keep_rounds, max_bytes=limits.max_bytes)
        if answer.files:
            last = max(file.round_max for file in answer.files)
            self._store.commit(remove=answer.files, numbers=numbers, note={"kind": "retire", "up_to_round": last})
            done.retired = answer.files
        if answer.unmet is not None:
            self._say(answer.unmet.split(":")[0], answer.unmet)

    def _merge(self, done: Maintained, numbers: Mapping[str, int], safe_round: int) -> None:
        limits = self._upkeep
        files = self._store.files()
        # files are retired whole: with a limit on the log, one of them may only be a small part of it
        target, most_rounds = limits.file_bytes, None
        if limits.max_bytes is not None:
            target = min(target, max(limits.max_bytes // _LEAST_PARTS, 1))
        if limits.keep_rounds is not None:
            most_rounds = max(limits.keep_rounds // _LEAST_PARTS, 1)
        whole = [file for file in files if file.name not in self._bad]
        plan = merge_plan(whole, target, safe_round, most_rounds=most_rounds)
        if not plan:
            return
        size = sum(file.bytes for file in plan[0])
        if limits.max_bytes is not None and self._disk is not None:
            # the copies need room beside what is written until the next vacuum makes some
            written = limits.file_bytes + self._disk.recent_bytes // 4
            if self._disk_bytes(files) + size + written > limits.max_bytes:
                return
        try:
            done.merge = merge(self._store, plan[0], numbers=numbers, compression=self._upkeep.compression)
            done.merged = plan[0]
        except BadFileError as error:
            self._bad.add(error.name)
            done.bad.append(error)
            log.warning("%s: %s: it is left out of merging", self._store.location, error)

    def _say(self, what: str, text: str) -> None:
        if self._clock() >= self._said.get(what, float("-inf")):
            self._said[what] = self._clock() + _SAY_AGAIN_SECONDS
            log.warning("%s: %s", self._store.location, text)
