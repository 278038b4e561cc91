"""The Ledger: the one committer of the Mistake Log, and the one place that knows how far Pilot and Copilot are.

Invariant: everything it has acknowledged stands in the Delta table (data files as table files, positions as application
transactions), so a Ledger that died is rebuilt from the table alone, and a call repeated after its death changes nothing
twice. Each commit also sets the attempt's number, so a second Ledger on the same table is noticed, not mixed in.
`Ledger` is a plain object; `start_ledger` puts it into a Ray actor. Called by the Pilot (attempts, files, end), the
Copilot (position) and the job (state).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_ray.mistakelog.datafile import DataFile
from tc_ray.mistakelog.schema import LogMetadata
from tc_ray.mistakelog.store import CommitConflictError, LogStore, StoredFile

_NOT_FINISHED = -1
_CONFLICT_TRIES = 5


class LedgerError(RuntimeError):
    """A call that does not fit the log: rounds skipped, an unknown rank, a checkpoint ahead of the log."""


class FencedError(RuntimeError):
    """The caller belongs to an attempt that a newer one has replaced: it must stop."""


@dataclass(frozen=True)
class LogState:
    """Where the log stands."""

    version: int
    """Delta table version."""
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
    """Last round the Copilot reported as consumed; 0 before."""
    copilot_steps: int


class Ledger:
    """Commits finished files and keeps the positions of a run.

    Args:
        path: folder of the table, which exists (`LogStore.create`).
        writers: Pilot workers, until `begin_attempt` says otherwise.
        run: must be the run the table belongs to.
    """

    def __init__(self, path: str | Path, *, writers: int, run: str) -> None:
        self._store = LogStore(path)
        if run != self._store.metadata.run:
            raise LedgerError(f"{self._store.path} is the log of run {self._store.metadata.run!r}, not {run!r}")
        self._prefix = f"tc_ray/{run}/"
        self._default_writers = writers
        self._copilot_round = self._copilot_steps = 0
        self._load()

    def _number(self, name: str, default: int) -> int:
        value = self._store.number(self._prefix + name)
        return default if value is None else value

    def _load(self) -> None:
        """Read everything this object knows from the table."""
        self._store.refresh()
        self._attempt = self._number("attempt", 0)
        self._watermark = self._number("watermark", 0)
        self._writers = self._number("writers", self._default_writers)
        self._finished = self._number("pilot_done", _NOT_FINISHED)
        ranks = range(self._writers)
        self._covered = [self._number(f"covered/{rank}/{self._attempt}", self._watermark) for rank in ranks]
        self._sequence = [self._number(f"sequence/{rank}/{self._attempt}", -1) for rank in ranks]
        files = self._store.files()
        self._rows = sum(file.rows for file in files)
        self._bytes = sum(file.bytes for file in files)
        self._files = len(files)

    def _commit(self, numbers: dict[str, int], add: list[DataFile], remove: list[StoredFile]) -> None:
        everything = {"attempt": self._attempt, **numbers}
        named = {self._prefix + name: value for name, value in everything.items()}
        self._store.commit(add=add, remove=remove, numbers=named)

    def _retrying(self, act: Callable[[], None]) -> None:
        """Run `act`, which checks and commits, again on fresh knowledge when another Ledger got in between."""
        for left in reversed(range(_CONFLICT_TRIES)):
            try:
                return act()
            except CommitConflictError:
                if not left:
                    raise
                self._load()
            except LedgerError:
                # refused on knowledge that another Ledger has made old?
                known = self._store.version
                self._load()
                if not left or self._store.version == known:
                    raise

    def begin_attempt(self, watermark: int, writers: int) -> int:
        """Start a new attempt: drop every round after `watermark` and refuse older attempts from now on.

        One table version does all of it. A call repeated because its answer was lost starts one more attempt, with the
        same effect.

        Args:
            watermark: last round of the checkpoint that the Pilot goes on from; 0: from the start.
            writers: Pilot workers of this attempt.

        Returns:
            The new attempt, from 1.

        Raises:
            LedgerError: the log does not reach the checkpoint, so going on would leave a gap.
        """
        if watermark < 0 or writers < 1:
            raise ValueError(f"watermark {watermark} must be >= 0 and writers {writers} >= 1")

        def act() -> None:
            if watermark > min(self._covered):
                raise LedgerError(
                    f"{self._store.path}: the checkpoint is at round {watermark}, but the log is complete only up to "
                    f"round {min(self._covered)}; start from an older checkpoint or a new run folder"
                )
            new = self._attempt + 1
            remove = [file for file in self._store.files() if file.round_max > watermark]
            straddling = [file for file in remove if file.round_min <= watermark]
            add = [self._store.trimmed(file, watermark, new) for file in straddling]
            numbers = {"attempt": new, "watermark": watermark, "writers": writers, "pilot_done": _NOT_FINISHED}
            self._commit(numbers, add, remove)
            self._load()

        self._retrying(act)
        return self._attempt

    def commit(self, file: DataFile) -> int:
        """Make a finished file, or the coverage of rounds without rows, part of the log.

        Returns:
            A table version that holds it. A repeated call returns one too and adds nothing.

        Raises:
            FencedError: the file's attempt was replaced.
            LedgerError: unknown rank or attempt, or rounds or sequence numbers were skipped.
            ValueError: the file is not in the table's folder with the stated size.
        """
        self._retrying(lambda: self._commit_file(file))
        return self._store.version

    def _commit_file(self, file: DataFile) -> None:
        if file.attempt < self._attempt:
            raise FencedError(f"attempt {file.attempt} was replaced by attempt {self._attempt} ({file.key})")
        if file.attempt > self._attempt or not 0 <= file.rank < self._writers:
            raise LedgerError(
                f"{file.key}: the current attempt is {self._attempt} with ranks 0..{self._writers - 1}; "
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
        self._commit(numbers, [file] if file.name is not None else [], [])
        self._sequence[file.rank], self._covered[file.rank] = file.sequence, file.round_max
        if file.name is not None:
            self._rows, self._bytes, self._files = self._rows + file.rows, self._bytes + file.bytes, self._files + 1

    def finish_pilot(self, last_round: int) -> None:
        """Note that the Pilot has ended with `last_round`; `begin_attempt` takes it back.

        Raises:
            LedgerError: the log already holds a later round.
        """

        def act() -> None:
            if last_round < max(self._covered):
                raise LedgerError(f"last_round {last_round}, but round {max(self._covered)} is in the log")
            self._commit({"pilot_done": last_round}, [], [])
            self._finished = last_round

        self._retrying(act)

    def report_copilot(self, round: int, steps: int) -> None:
        """Note the last round the Copilot has consumed and its optimizer steps so far (both may fall: a restart).

        Held in memory only: the truth stands in the Copilot's checkpoint, and the Copilot repeats itself while it runs.
        """
        self._copilot_round, self._copilot_steps = round, steps

    def copilot_round(self) -> int:
        """Last round the Copilot reported as consumed."""
        return self._copilot_round

    def state(self) -> LogState:
        """Where the log stands; touches no disk."""
        return LogState(
            version=self._store.version,
            attempt=self._attempt,
            round=min(self._covered),
            rows=self._rows,
            bytes=self._bytes,
            files=self._files,
            pilot_done=self._finished != _NOT_FINISHED,
            last_round=max(self._finished, 0),
            copilot_round=self._copilot_round,
            copilot_steps=self._copilot_steps,
        )


def start_ledger(path: str | Path, metadata: LogMetadata, *, writers: int, run: str) -> Any:
    """Create or open the table and start the Ledger as a Ray actor that restarts by itself.

    The actor lives as long as a handle to it does in the starting process.

    Returns:
        The actor handle.

    Raises:
        LogSchemaError: see `LogStore.create`.
        LedgerError: see `Ledger`.
    """
    import ray

    # made here, so that a bad folder is reported to the caller at once and the restarted actor only opens
    LogStore.create(path, metadata)
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)(Ledger)
    handle = actor.remote(str(Path(path).absolute()), writers=writers, run=run)
    ray.get(handle.state.remote())
    return handle


def submit_to(handle: Any) -> Callable[[DataFile], int]:
    """`submit` of a `RecordWriter` for a Ledger actor.

    Ray repeats a call whose actor died until the restarted one answers; `commit` recognises the repetition.
    """
    import ray

    def submit(file: DataFile) -> int:
        try:
            return int(ray.get(handle.commit.remote(file)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    return submit
