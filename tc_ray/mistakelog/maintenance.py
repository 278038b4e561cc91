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

from tc_ray.mistakelog.compaction import merge, merge_plan
from tc_ray.mistakelog.datafile import BadFileError, Compression, DataFile
from tc_ray.mistakelog.outage import may_pass
from tc_ray.mistakelog.retention import Standing, retire
from tc_ray.mistakelog.store import LogStore, StoredFile
from tc_ray.mistakelog.upkeep import Upkeep
from tc_ray.mistakelog.vacuum import Vacuum, clean

log = logging.getLogger(__name__)

_VACUUM_SECONDS = (0.2, 60.0)
_SAY_AGAIN_SECONDS = 600.0


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
        compression: of merged files.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        store: LogStore,
        upkeep: Upkeep,
        compression: Compression = "none",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._upkeep, self._compression, self._clock = store, upkeep, compression, clock
        self._vacuum_due = self._clock()
        self._disk: Vacuum | None = None
        self._said: dict[str, float] = {}
        self._bad: set[str] = set()

    def maintain(
        self, *, numbers: Mapping[str, int], safe_round: int, copilot_round: int | None, attempt: int
    ) -> Maintained:
        """Do what is due.

        Args:
            numbers: as for `LogStore.commit`, in each commit made here.
            safe_round: last round that no restart of the Pilot takes back: that of its newest checkpoint.
            copilot_round: last round consumed by the Copilot; None: there is no Copilot.
            attempt: of the run at work.

        Raises:
            CommitConflictError: another process commits to this log.
        """
        done = Maintained()
        try:
            self._retire(done, numbers, safe_round, copilot_round)
            if self._upkeep.compact:
                self._merge(done, numbers, safe_round)
            self._vacuum(done, attempt)
        except OSError as error:
            if not may_pass(error):
                raise
            self._say("space", f"upkeep is put off: {error}")
        return done

    def _retire(self, done: Maintained, numbers: Mapping[str, int], safe_round: int, copilot_round: int | None) -> None:
        limits = self._upkeep
        if limits.keep_rounds is None and limits.max_bytes is None:
            return
        disk = self._disk
        standing = Standing(
            safe_round=safe_round,
            copilot_round=copilot_round,
            buffer_rounds=limits.buffer_rounds,
            recent_bytes=disk.recent_bytes if disk else 0,
            disk_bytes=disk.disk_bytes if disk else 0,
        )
        answer = retire(self._store.files(), standing, keep_rounds=limits.keep_rounds, max_bytes=limits.max_bytes)
        if answer.files:
            last = max(file.round_max for file in answer.files)
            self._store.commit(remove=answer.files, numbers=numbers, note={"kind": "retire", "up_to_round": last})
            done.retired = answer.files
        if answer.unmet is not None:
            self._say(answer.unmet.split(":")[0], answer.unmet)

    def _merge(self, done: Maintained, numbers: Mapping[str, int], safe_round: int) -> None:
        files = [file for file in self._store.files() if file.name not in self._bad]
        plan = merge_plan(files, self._upkeep.file_bytes, safe_round)
        if not plan:
            return
        try:
            done.merge = merge(self._store, plan[0], numbers=numbers, compression=self._compression)
            done.merged = plan[0]
        except BadFileError as error:
            self._bad.add(error.name)
            done.bad.append(error)
            log.warning("%s: %s: it is left out of merging", self._store.location, error)

    def _vacuum(self, done: Maintained, attempt: int) -> None:
        if self._clock() < self._vacuum_due:
            return
        limits = self._upkeep
        done.vacuum = self._disk = clean(
            self._store,
            orphan_seconds=limits.orphan_seconds,
            grace_seconds=limits.grace_seconds,
            live_attempt=attempt,
        )
        shortest, longest = _VACUUM_SECONDS
        self._vacuum_due = self._clock() + min(max(limits.grace_seconds / 4, shortest), longest)
        if done.vacuum.removed:
            log.info("%s", done.vacuum.lines()[0])

    def _say(self, what: str, text: str) -> None:
        if self._clock() >= self._said.get(what, float("-inf")):
            self._said[what] = self._clock() + _SAY_AGAIN_SECONDS
            log.warning("%s: %s", self._store.location, text)
