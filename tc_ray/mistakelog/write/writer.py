"""The record writer of one Pilot worker: a bounded queue and one thread between the training step and the disk.

Invariant: a data file holds whole rounds of one rank, in order, and no NaN or infinity. It is handed to the Ledger only when it is
complete and on disk; `flush` returns True only after the Ledger acknowledged. Every record that was put is in the log or
counted as dropped in the commit that covers its round. The step waits for the disk only when the queue is full, until half is
free or a file is cut, or not at all (`log.full_policy: drop`); both are counted. In memory are at most the queue, the round that
has not ended, and the rows of the open file (`file_bytes` and one round).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.rows.finite import only_finite
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.data_file import TEMPORARY_SUFFIX, DataFile, Finished, file_name
from tc_ray.mistakelog.table.errors import FencedError, WriterError, retry
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.write.open_file import OpenFile
from tc_ray.mistakelog.write.queue import Batch, Cut, WriteQueue

log = logging.getLogger(__name__)

T = TypeVar("T")


class RecordWriter:
    """Writes the records of one rank in one attempt.

    Args:
        submit: hands a finished file to the Ledger and returns the table version; called in the writer thread.
        settings: `flush_rounds`, `file_bytes`, `queue_rounds`, `full_policy` and `compression` count. The queue holds the
            micro-batches of one round more. The thread repeats a write that failed for want of space, under both policies.
        attempt: as returned by `Ledger.begin_attempt`.
        start_round: last round already in the log for this attempt: the watermark given to `begin_attempt`.
    """

    def __init__(
        self,
        location: str | Path | Location,
        submit: Callable[[DataFile], int],
        settings: LogSection,
        *,
        run: str,
        rank: int,
        attempt: int,
        start_round: int = 0,
    ) -> None:
        self.rank, self.attempt = rank, attempt
        self._location, self._submit, self._settings = Location(location), submit, settings
        self._blocks = settings.full_policy == "block"

        self._changed = threading.Condition()
        # shared with the thread, under _changed
        self._queue = WriteQueue()
        self._error: BaseException | None = None
        self._closing = False
        self._acknowledged = start_round
        self._file_total_bytes = 0
        self._full_since: float | None = None
        self._full_seconds = 0.0
        # the caller's side
        self._ended = start_round
        self._records = 0
        self._blocked_seconds = 0.0
        # the thread's side
        self._file = OpenFile(self._location, settings.compression, run)
        # batches of the round that has not ended: kept out of the file, which may be cut before they are complete
        self._unfinished: list[Batch] = []
        self._sequence = 0
        self._covered = start_round

        self._remove_leftovers()
        self._thread = threading.Thread(target=self._work, name=f"mistake-log-writer-{rank}", daemon=True)
        self._thread.start()

    def _remove_leftovers(self) -> None:
        """Unfinished files of this rank's earlier attempts: their writers are dead or fenced."""
        if self._location.local is None:
            return
        pattern = re.compile(rf"-rank{self.rank}-a(\d+)-.*{re.escape(TEMPORARY_SUFFIX)}$")
        for entry in self._location.list(recursive=False):
            found = pattern.search(entry.name)
            if found and int(found[1]) < self.attempt:
                self._location.delete(entry.name)

    def put(self, records: Records, round: int, wait: Callable[[], object] | None = None) -> bool:
        """Queue one micro-batch of `round`. Its arrays must not change afterwards: they are written without a copy.

        Args:
            wait: returns when the arrays that come from a device have their values; called once, in the writer thread. Round,
                rank, attempt and offsets are read before.

        Returns:
            False if the records were dropped, because the queue is full (`drop`).

        Raises (as the other methods do):
            ValueError: the records are of another round, rank or attempt, or of a round already ended.
            FencedError, WriterError: the writer thread has stopped.
        """
        if ((records.round != round) | (records.rank != self.rank) | (records.attempt != self.attempt)).any():
            raise ValueError(f"records are not all of round {round}, rank {self.rank}, attempt {self.attempt}")
        if round != self._ended + 1:
            raise ValueError(f"records of round {round}, but round {self._ended} was the last to end")
        limit = self._settings.queue_rounds
        with self._changed:
            self._check_usable()
            if self._queue.depth >= limit and self._blocks:
                started = time.monotonic()
                self._changed.wait_for(lambda: self._queue.depth < limit or self._error is not None)
                self._blocked_seconds += time.monotonic() - started
                self._raise_error()
            if self._queue.depth >= limit:
                self._queue.drop(round, len(records))
                return False
            self._queue.push(Batch(round, records, wait))
            self._records += len(records)
            self._changed.notify_all()
        return True

    def end_round(self, round: int, *, left_out: bool = False) -> None:
        """All of this rank's micro-batches of `round` were put (possibly none).

        Args:
            left_out: the round took no step, because its loss or gradient was not finite; its records are dropped and counted.
        """
        if round != self._ended + 1:
            raise ValueError(f"end of round {round}, but round {self._ended} was the last to end")
        with self._changed:
            self._check_usable()
            if left_out:
                self._queue.left_out.add(round)
            self._queue_cut(Cut(round, force=False))
        self._ended = round

    def _queue_cut(self, cut: Cut) -> None:
        self._queue.end_round(cut)
        self._changed.notify_all()

    def flush(self, round: int, timeout: float | None = None) -> bool:
        """Cut a file now and wait until the Ledger has acknowledged everything up to `round`.

        Args:
            round: one that has ended.
            timeout: seconds to wait at most; None: no limit.

        Returns:
            Whether it has. False: not within `timeout`, or (`drop`) the log cannot be written just now. Then no checkpoint may
            be made of this round; training can go on, and a later `flush` covers it.
        """
        if round > self._ended:
            raise ValueError(f"flush of round {round}, but the last ended round is {self._ended}")
        with self._changed:
            self._check_usable()
            if self._acknowledged >= round:
                return True
            self._queue_cut(Cut(self._ended, force=True))
            self._changed.wait_for(
                lambda: (
                    self._acknowledged >= round
                    or self._error is not None
                    or (not self._blocks and self._full_since is not None)
                ),
                timeout,
            )
            self._raise_error()
            return self._acknowledged >= round

    def close(self) -> None:
        """Commit all ended rounds, as soon as the log can be written; drop the records of a round that has not ended; stop."""
        with self._changed:
            if self._error is None and not self._closing:
                self._queue_cut(Cut(self._ended, force=True))
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._raise_error()

    def stats(self) -> dict[str, float]:
        """Counts since this writer was made.

        records (accepted by `put`), dropped_records (of all, those not in the log), not_finite_records (of those, dropped for a
        NaN or an infinity), bytes (of acknowledged files), blocked_seconds (`put` waiting for a full queue), full_seconds (the
        log could not be written), queue_depth (micro-batches waiting now), acknowledged_round (last one acknowledged).
        """
        with self._changed:
            full = time.monotonic() - self._full_since if self._full_since is not None else 0.0
            return {
                "records": self._records,
                "dropped_records": self._queue.dropped,
                "not_finite_records": self._queue.not_finite,
                "bytes": self._file_total_bytes,
                "blocked_seconds": self._blocked_seconds,
                "full_seconds": self._full_seconds + full,
                "queue_depth": self._queue.depth,
                "acknowledged_round": self._acknowledged,
            }

    def _raise_error(self) -> None:
        if isinstance(self._error, FencedError):
            raise type(self._error)(str(self._error)) from self._error
        if self._error is not None:
            raise WriterError(
                f"the log writer of rank {self.rank} failed after round {self._acknowledged}: {self._error}"
            ) from self._error

    def _check_usable(self) -> None:
        self._raise_error()
        if self._closing:
            raise WriterError(f"the log writer of rank {self.rank} is closed")

    # everything below runs in the writer thread

    def _work(self) -> None:
        try:
            while (entry := self._next()) is not None:
                if isinstance(entry, Batch):
                    self._take(entry)
                else:
                    self._write_round(entry.round)
                    self._cut(entry)
        except BaseException as error:
            log.exception("the log writer of rank %d stops", self.rank)
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._file.withdraw()

    def _next(self) -> Batch | Cut | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            entry = self._queue.pop()
            if 2 * self._queue.depth <= self._settings.queue_rounds:
                # not at each place that becomes free: the two threads would take turns micro-batch by micro-batch
                self._changed.notify_all()
            return entry

    def _take(self, batch: Batch) -> None:
        if batch.wait is not None:
            batch.wait()
        records, dropped = only_finite(batch.records)
        with self._changed:
            self._queue.drop(batch.round, dropped, not_finite=True)
        self._unfinished.append(Batch(batch.round, records))

    def _write_round(self, round: int) -> None:
        """Move batches of rounds up to `round` to the open file, and to the disk as it sees fit."""
        with self._changed:
            ready = self._queue.without_left_out(batch for batch in self._unfinished if batch.round <= round)
        for batch in ready:
            self._file.add(batch.records)
        self._unfinished = [batch for batch in self._unfinished if batch.round > round]
        if self._file.rows:
            self._until_written(lambda: self._file.write(self._name()))

    def _name(self) -> str:
        return file_name(self._covered + 1, self.rank, self.attempt, self._sequence)

    def _cut(self, cut: Cut) -> None:
        long = cut.round - self._covered >= self._settings.flush_rounds or self._file.bytes >= self._settings.file_bytes
        if cut.round > self._covered and (cut.force or long):
            with self._changed:  # `put` need not wait for a commit where there is a place
                self._changed.notify_all()
            self._commit(self._covered + 1, cut.round)

    def _commit(self, first: int, last: int) -> None:
        name, finished, rows = None, Finished(0, 0), self._file.rows
        if rows:
            name, finished = self._until_written(lambda: self._file.finish(self._name()))
            self._file.clear()
        with self._changed:
            dropped = self._queue.take_drops(last)
        origin = (self.rank, self.attempt, self._sequence)
        file = DataFile(name, rows, finished.size, first, last, *origin, finished.crc32, dropped)
        # an error does not say that nothing was committed: the same file is submitted again, and the Ledger knows repetitions
        self._until_written(lambda: self._submit(file))
        self._sequence += 1
        self._covered = last
        with self._changed:
            self._acknowledged = last
            self._file_total_bytes += finished.size
            self._changed.notify_all()

    def _until_written(self, act: Callable[[], T]) -> T:
        """What `act` returns; it is repeated until the disk or store takes it."""
        result = retry(act, f"log writer of rank {self.rank}", self._failed)
        with self._changed:
            if self._full_since is not None:
                self._full_seconds += time.monotonic() - self._full_since
                self._full_since = None
        return result

    def _failed(self) -> None:
        self._file.withdraw()
        with self._changed:
            if self._full_since is None:
                self._full_since = time.monotonic()
            self._changed.notify_all()
