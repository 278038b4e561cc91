"""The Ledger: the one committer of the Mistake Log, and the one place that knows how far Pilot and Copilot are.

Invariants:

- Everything that it has acknowledged is in the Delta table (data files as table files, positions as application transactions).
  So a Ledger that died is rebuilt from the table alone, and a call repeated after its death changes nothing twice.
- What it knows belongs to one table version, and it commits the next version or none: a second Ledger is noticed.
- A lost lease is final: after the first call that finds another lease, all calls raise LeaseLostError.
- Calls of several threads take turns (`_turn`). `state` waits for nobody; `maintain` gives the turn away while it writes.

`ledger_actor.py` puts it into a Ray actor. Called by the Pilot (attempts, files, end), the Copilot (position) and the job (state).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.maintain.compaction import write_copy
from tc_ray.mistakelog.maintain.maintenance import Maintenance, Position
from tc_ray.mistakelog.maintain.quarantine import quarantined, set_aside
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.data_file import BadFileError, DataFile
from tc_ray.mistakelog.table.errors import CommitConflictError, FencedError, LogFullError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import repair
from tc_ray.mistakelog.table.store import LogStore

log = logging.getLogger(__name__)

_NOT_FINISHED = -1
_CONFLICT_TRIES = 5


class LedgerError(RuntimeError):
    """A call that does not fit the log: rounds skipped, an unknown rank, a checkpoint ahead of the log."""


@dataclass(frozen=True)
class LogState:
    """Where the log stands."""

    version: int
    attempt: int
    """Current attempt, from 1; 0 before the first `begin_attempt`."""
    round: int
    """Largest r such that every writer committed all its records of all rounds <= r."""
    rows: int
    bytes: int
    files: int
    pilot_done: bool
    last_round: int
    """Last round of the Pilot; 0 until `pilot_done`."""
    copilot_round: int
    copilot_steps: int
    dropped: int = 0
    """Records that could not be written and are missing in the log (`log.full_policy: drop`, and rows that are not finite)."""
    quarantined: int = 0


class Ledger:
    """Commits finished files and keeps the positions of a run.

    Args:
        location: of the table, which exists (`LogStore.create`).
        writers: Pilot workers, until `begin_attempt` says otherwise.
        run: must be the run that the table belongs to.
        lease: number of the run's lease; None: the caller ensures that nobody else is at work on the log.
        settings: what `maintain` keeps the log to; None: there is no maintenance.
        buffer_rounds: rounds behind the Copilot's position that it reads again after a restart.
    """

    def __init__(
        self,
        location: str | Path | Location,
        *,
        writers: int,
        run: str,
        lease: int | None = None,
        settings: LogSection | None = None,
        buffer_rounds: int = 1,
    ) -> None:
        repair(Location(location))
        self._store = LogStore(location, lease=lease)
        if run != self._store.metadata.run:
            raise LedgerError(f"{self._store.location} is the log of run {self._store.metadata.run!r}, not {run!r}")
        self._lock = threading.RLock()
        self._log_full = False
        self._maintaining = threading.Lock()
        self._maintenance: Maintenance | None = None
        if settings is not None:
            self._maintenance = Maintenance(self._store, settings, buffer_rounds, self._maintenance_turn)
        self._prefix = f"tc_ray/{run}/"
        self._default_writers = writers
        self._copilot_round = self._copilot_steps = self._checkpoint_round = 0
        self._store.adopt()
        self._load()

    def _number(self, name: str, default: int) -> int:
        value = self._store.number(self._prefix + name)
        return default if value is None else value

    def _load(self) -> None:
        self._store.refresh()
        self._store.settle()  # commits of another Ledger, or one of our own that seemed to fail
        attempt, watermark = self._number("attempt", 0), self._number("watermark", 0)
        finished = self._number("pilot_done", _NOT_FINISHED)
        self._writers = self._number("writers", self._default_writers)
        ranks = range(self._writers)
        self._covered = [self._number(f"covered/{rank}/{attempt}", watermark) for rank in ranks]
        self._sequence = [self._number(f"sequence/{rank}/{attempt}", -1) for rank in ranks]
        # reads every commit: only if one of them has drop counts
        drops = dropped_records(self._store.commits()) if self._number("drops", 0) else {}
        self._checkpoint_round = max(self._checkpoint_round, watermark)
        self._state = LogState(
            attempt=attempt,
            round=min(self._covered),
            pilot_done=finished != _NOT_FINISHED,
            last_round=max(finished, 0),
            copilot_round=0,
            copilot_steps=0,
            dropped=sum(sum(rounds.values()) for rounds in drops.values()),
            **self._counts(),
        )

    def _counts(self) -> dict[str, Any]:
        files = self._store.files()
        return {
            "version": self._store.version,
            "rows": sum(file.rows for file in files),
            "bytes": sum(file.bytes for file in files),
            "files": len(files),
            "quarantined": len(quarantined(self._store.location)),
        }

    def _catch_up(self) -> None:
        """Know the newest version, and that the lease is still held there."""
        # a version of our own that is not known seemed to fail: it may be there all the same
        if self._state.version != self._store.version or not self._store.is_newest():
            self._load()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else changes the log or what is known of it."""
        with self._lock:
            self._store.check_lease()
            yield

    @contextlib.contextmanager
    def _maintenance_turn(self) -> Iterator[Position]:
        with self._turn():
            with contextlib.suppress(LogFullError):  # of a version that waits for space: nothing is built upon it
                self._catch_up()
            yield Position(
                numbers=self._signed({}),
                safe_round=min(self._checkpoint_round, *self._covered),
                copilot_round=self._copilot_round,
                attempt=self._state.attempt,
            )
            if self._state.version != self._store.version:
                self._state = replace(self._state, **self._counts())

    def _commit(self, numbers: Mapping[str, int], state: Mapping[str, Any], **changes: Any) -> None:
        """`LogStore.commit`, with the Ledger's names of numbers. state: what changes in `LogState` besides the version."""
        try:
            version = self._store.commit(numbers=self._signed(numbers), **changes)
        except LogFullError:
            self._log_full = True
            self._load()  # it may have reached the table
            raise
        self._log_full = False
        self._state = replace(self._state, version=version, **state)

    def _signed(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Numbers of a commit by their names in the table, with the attempt's."""
        return {self._prefix + name: value for name, value in {"attempt": self._state.attempt, **numbers}.items()}

    def _retrying(self, act: Callable[[], None]) -> None:
        """Run `act`, which checks and commits; run it again on fresh knowledge if another Ledger came between."""
        with self._turn():
            self._catch_up()
            for left in reversed(range(_CONFLICT_TRIES)):
                try:
                    return act()
                except CommitConflictError:
                    if not left:
                        raise
                    self._load()

    def begin_attempt(self, watermark: int, writers: int) -> int:
        """Start a new attempt, in one table version: drop every round after `watermark` and refuse older attempts from now on.

        A call repeated because its answer was lost starts one more attempt, with the same effect.

        Args:
            watermark: last round of the checkpoint that the Pilot resumes from; 0: from the start.
            writers: Pilot workers of this attempt.

        Returns:
            The new attempt, from 1.

        Raises LedgerError: the log does not reach the checkpoint, so there would be a gap.
        """
        if watermark < 0 or writers < 1:
            raise ValueError(f"watermark {watermark} must be >= 0 and writers {writers} >= 1")

        def act() -> None:
            if watermark > min(self._covered):
                raise LedgerError(
                    f"{self._store.location}: the checkpoint is at round {watermark}, but the log is complete only up to "
                    f"round {min(self._covered)}; start from an older checkpoint or a new run folder"
                )
            new = self._state.attempt + 1
            remove = [file for file in self._store.files() if file.round_max > watermark]
            add = []
            for file in [file for file in remove if file.round_min <= watermark]:
                # a name of its own: another process that believes to fence may have committed a copy too
                stem, unique = file.name.removesuffix(".parquet"), uuid.uuid4().hex[:12]
                name = f"{stem}-cut{watermark}-a{new}-{unique}.parquet"
                try:
                    add.append(write_copy(self._store, [file], name, watermark=watermark))
                except BadFileError as error:
                    self._set_aside(error)
                    remove.remove(file)
            numbers = {"attempt": new, "watermark": watermark, "writers": writers, "pilot_done": _NOT_FINISHED}
            note = {"kind": "attempt", "watermark": watermark}
            state = {"attempt": new, "round": watermark, "pilot_done": False, "last_round": 0}
            self._commit(numbers, state, add=add, remove=remove, note=note)
            self._checkpoint_round = watermark
            self._load()

        self._retrying(act)
        return self._state.attempt

    def commit(self, file: DataFile) -> int:
        """Make a finished file, or the coverage of rounds without rows, part of the log.

        Returns:
            A table version that holds it. A repeated call returns one too and adds nothing.

        Raises:
            FencedError: the file's attempt was replaced.
            LedgerError: unknown rank or attempt, or rounds or sequence numbers were skipped.
            LogFullError: no space for the commit; call again when there is.
            ValueError: the file is not in the table's folder with the stated size.
        """
        self._retrying(lambda: self._commit_file(file))
        return self._state.version

    def maintain(self) -> None:
        """Do the maintenance that is due: vacuum, retention, merges. After a commit that found the disk full, no merges.

        Other calls go on meanwhile; a second call of this one waits.
        """
        if self._maintenance is None:
            with self._turn():
                self._catch_up()
            return
        with self._maintaining:
            while self._maintenance.maintain(merge=not self._log_full).merged:
                pass

    def _commit_file(self, file: DataFile) -> None:
        known = self._state
        if file.attempt < known.attempt:
            raise FencedError(f"attempt {file.attempt} was replaced by attempt {known.attempt} ({file.key})")
        if file.attempt > known.attempt or not 0 <= file.rank < self._writers:
            raise LedgerError(
                f"{file.key}: the current attempt is {known.attempt} with ranks 0..{self._writers - 1}; "
                "call begin_attempt first"
            )
        last = self._sequence[file.rank]
        if file.sequence <= last:
            return
        expected = self._covered[file.rank] + 1
        if file.sequence != last + 1 or file.round_min != expected or file.round_max < file.round_min:
            raise LedgerError(
                f"{file.key} covers rounds {file.round_min}..{file.round_max}, "
                f"expected sequence {last + 1} from round {expected} on"
            )
        suffix = f"{file.rank}/{file.attempt}"
        numbers = {f"sequence/{suffix}": file.sequence, f"covered/{suffix}": file.round_max}
        if file.dropped:
            numbers["drops"] = 1
        # coverage alone matters only for its drop counts
        add, covered = ([file], []) if file.name is not None else ([], [file] if file.dropped else [])
        rounds = [*self._covered[: file.rank], file.round_max, *self._covered[file.rank + 1 :]]
        state = {
            "round": min(rounds),
            "rows": known.rows + file.rows,
            "bytes": known.bytes + file.bytes,
            "files": known.files + len(add),
            "dropped": known.dropped + sum(file.dropped.values()),
        }
        self._commit(numbers, state, add=add, covered=covered, note={"kind": "append"})
        self._sequence[file.rank], self._covered = file.sequence, rounds

    def quarantine(self, name: str, reason: str) -> bool:
        """Take a file that a reader found damaged out of the log, if it is found so here too. Returns whether it was taken out."""
        with self._turn():
            self._catch_up()
            file = next((file for file in self._store.files() if file.name == name), None)
            if file is None:
                return False
            try:
                self._store.read(file)
            except BadFileError as error:
                self._set_aside(error)
                return True
        log.warning("%s: a reader found %s damaged (%s); here it is whole", self._store.location, name, reason)
        return False

    def _set_aside(self, error: BadFileError) -> None:
        set_aside(self._store, [error], numbers=self._signed({}))
        self._state = replace(self._state, **self._counts())

    def finish_pilot(self, last_round: int) -> None:
        """Note that the Pilot has ended with `last_round`, and finish maintenance; `begin_attempt` takes it back.

        Raises LedgerError: the log already holds a later round.
        """

        def act() -> None:
            if last_round < max(self._covered):
                raise LedgerError(f"last_round {last_round}, but round {max(self._covered)} is in the log")
            state = {"pilot_done": True, "last_round": last_round}
            self._commit({"pilot_done": last_round}, state, note={"kind": "end"})

        self._retrying(act)
        self.maintain()

    def report_copilot(self, round: int, steps: int) -> None:
        """Note the last round that the Copilot has consumed and its optimizer steps so far (a restart may lower both).

        Held in memory only: the Copilot repeats its report while it runs.
        """
        self._store.check_lease()
        self._copilot_round, self._copilot_steps = round, steps

    def report_checkpoint(self, round: int) -> None:
        """Note the round of the Pilot's newest complete checkpoint: earlier rounds are never fenced again.

        Held in memory only: after a restart the watermark takes its place until the next checkpoint.
        """
        self._store.check_lease()
        self._checkpoint_round = round

    def copilot_round(self) -> int:
        """Last round the Copilot reported as consumed; 0 before."""
        self._store.check_lease()
        return self._copilot_round

    def state(self) -> LogState:
        """Where the log stands. Answered from memory, also during other calls."""
        self._store.check_lease()
        return replace(self._state, copilot_round=self._copilot_round, copilot_steps=self._copilot_steps)
