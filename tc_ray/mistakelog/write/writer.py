"""The record writer of one Pilot worker: a bounded queue and one thread between the training step and the disk.

Invariant: a data file holds whole rounds of one rank, in order, and no NaN or infinity, and is handed to the Ledger only when it
is complete and on disk; `flush` returns True only after the Ledger acknowledged. Every record that was put is in the log or
counted as dropped in the commit that covers its round. The step waits for the disk only when the queue was full, until half is
free or a file is cut, or not at all by policy, and both are counted. In memory are at most the queue, the round that has not
ended, and the rows of the file being written (`file_bytes` and one round). Called by the Pilot's loop: `put`, `end_round`, `flush`.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from tc_ray.mistakelog.rows.finite import only_finite
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.data_file import TEMPORARY_SUFFIX, Compression, DataFile, Finished, file_name
from tc_ray.mistakelog.table.errors import FencedError, WriterError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.retry import FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS, OutageClock, may_pass
from tc_ray.mistakelog.write.open_file import HeldPart
from tc_ray.mistakelog.write.queue import Batch, Cut, PendingRecords, RoundQueue

log = logging.getLogger(__name__)

# under `stop` the rows are gone: what tells that there is space again is a file of about their size, within these bounds
_PROBE_BYTES = (64 << 10, 16 << 20)
_CONSEQUENCE = {
    "block": "the Pilot waits for it when the queue is full",
    "subsample": "what finds the queue full is dropped",
    "stop": "records are dropped until it can",
}
T = TypeVar("T")


class RecordWriter:
    """Writes the records of one rank in one attempt.

    Args:
        location: of the Delta table.
        submit: hands a finished file to the Ledger and returns the table version; called in the writer thread.
        run: value of the `run` column.
        rank: of this Pilot worker.
        attempt: as returned by `Ledger.begin_attempt`.
        flush_rounds: a file is cut at least every this many rounds.
        file_bytes: a file is cut at the end of the round in which its records pass this size in memory.
        queue_rounds: micro-batches that may wait for the thread; it holds those of one more round.
        full_policy: no space, or a store that does not answer: `block` and `subsample` try again until it works; with
            `block`, `put` waits when the queue is full, with `subsample` it drops the micro-batch then (also behind a disk
            that is only slow). `stop` throws away what waits and all that follows until a probe can be written.
        compression: of the Parquet pages.
        start_round: last round already in the log for this attempt: the watermark given to `begin_attempt`.
    """

    def __init__(
        self,
        location: str | Path | Location,
        submit: Callable[[DataFile], int],
        *,
        run: str,
        rank: int,
        attempt: int,
        flush_rounds: int,
        file_bytes: int,
        queue_rounds: int,
        full_policy: Literal["block", "subsample", "stop"] = "block",
        compression: Compression = "none",
        start_round: int = 0,
    ) -> None:
        self._location = Location(location)
        self._submit, self._run, self._rank, self._attempt = submit, run, rank, attempt
        self._flush_rounds, self._file_bytes, self._queue_rounds = flush_rounds, file_bytes, queue_rounds
        self._policy = full_policy

        self._changed = threading.Condition()
        # shared with the thread, under _changed
        self._queue = RoundQueue()
        self._error: BaseException | None = None
        self._closing = self._abandoned = False
        self._acknowledged = start_round
        self._file_total_bytes = 0
        self._outage = OutageClock(f"log writer of rank {rank}")
        self._recording = True
        # the caller's side
        self._ended = start_round
        self._records = 0
        self._blocked_seconds = 0.0
        # the thread's side
        self._held = HeldPart(self._location, compression)
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
        pattern = re.compile(rf"-rank{self._rank}-a(\d+)-.*{re.escape(TEMPORARY_SUFFIX)}$")
        for entry in self._location.list(recursive=False):
            found = pattern.search(entry.name)
            if found and int(found[1]) < self._attempt:
                self._location.delete(entry.name)

    def put(self, records: Records | PendingRecords, round: int) -> bool:
        """Queue one micro-batch of `round`. Its arrays must not change afterwards: they are written without a copy.

        Returns:
            False if the records were dropped: queue full (subsample), or no space (stop).

        Raises:
            ValueError: the records are of another round, rank or attempt, or of a round already ended.
            FencedError, WriterError: the writer thread has stopped.
        """
        if isinstance(records, Records):
            self._check_origin(records, round)
            count = len(records)
        else:
            count = records.count
            if records.round != round:
                raise ValueError(f"records of round {records.round}, put as round {round}")
        if round != self._ended + 1:
            raise ValueError(f"records of round {round}, but round {self._ended} was the last to end")
        with self._changed:
            self._check_usable()
            if self._recording and self._queue.depth >= self._queue_rounds and self._policy != "subsample":
                started = time.monotonic()
                self._changed.wait_for(lambda: self._queue.depth < self._queue_rounds or self._error is not None)
                self._blocked_seconds += time.monotonic() - started
                self._raise_error()
            if not self._recording or self._queue.depth >= self._queue_rounds:
                self._queue.drop(round, count)
                return False
            self._queue.push(Batch(round, count, records))
            self._records += count
            self._changed.notify_all()
        return True

    def _check_origin(self, records: Records, round: int) -> None:
        stray = (records.round != round) | (records.rank != self._rank) | (records.attempt != self._attempt)
        if stray.any():
            raise ValueError(f"records are not all of round {round}, rank {self._rank}, attempt {self._attempt}")

    def end_round(self, round: int, *, spoilt: bool = False) -> None:
        """All of this rank's micro-batches of `round` were put (possibly none). `spoilt`: it took no step, as its loss or gradient
        was not finite; its records are dropped and counted.

        Raises:
            ValueError: not the round after the last one.
            FencedError, WriterError: the writer thread has stopped.
        """
        if round != self._ended + 1:
            raise ValueError(f"end of round {round}, but round {self._ended} was the last to end")
        with self._changed:
            self._check_usable()
            if spoilt:
                self._queue.spoil(round)
            self._queue_cut(Cut(round, force=False))
        self._ended = round

    def _queue_cut(self, cut: Cut) -> None:
        # rounds pass by while the log cannot be written, and the queue must not grow by their ends
        self._queue.end_round(cut, merge=self._outage.open)
        self._changed.notify_all()

    def flush(self, round: int, timeout: float | None = None) -> bool:
        """Cut a file now and wait until the Ledger has acknowledged everything up to `round`.

        Args:
            round: one that has ended.
            timeout: seconds to wait at most; None: no limit.

        Returns:
            Whether it has. False: not within `timeout`, or (subsample, stop) the log cannot be written just now. Then no
            checkpoint may be made of this round; training can go on, and a later `flush` covers it.

        Raises:
            ValueError: `round` has not ended.
            FencedError, WriterError: the writer thread has stopped.
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
                    or (self._policy != "block" and self._outage.open)
                ),
                timeout,
            )
            self._raise_error()
            return self._acknowledged >= round

    def close(self, timeout: float | None = None) -> None:
        """Commit all ended rounds, drop the records of a round that has not ended, stop the thread.

        Waits, under every policy, until the log can be written, or for `timeout` seconds.

        Raises:
            FencedError, WriterError: the writer thread had stopped with an error, or `timeout` has passed.
        """
        with self._changed:
            if self._error is None and not self._closing:
                self._queue_cut(Cut(self._ended, force=True))
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                self._abandoned = True
                self._changed.notify_all()
            raise WriterError(
                f"the log writer of rank {self._rank}: rounds {self._acknowledged + 1} to {self._ended} could not be "
                f"written within {timeout} s"
            )
        with self._changed:
            self._raise_error()

    def stats(self) -> dict[str, float]:
        """Counts since this writer was made.

        records (accepted by `put`), dropped_records (of all, those not in the log), not_finite_records (of those, dropped for a
        NaN or an infinity), bytes (of acknowledged files), blocked_seconds (`put` waiting for a full queue), full_seconds (the
        log could not be written), queue_depth (micro-batches waiting now), acknowledged_round (last one acknowledged).
        """
        with self._changed:
            return {
                "records": self._records,
                "dropped_records": self._queue.dropped,
                "not_finite_records": self._queue.not_finite,
                "bytes": self._file_total_bytes,
                "blocked_seconds": self._blocked_seconds,
                "full_seconds": self._outage.seconds,
                "queue_depth": self._queue.depth,
                "acknowledged_round": self._acknowledged,
            }

    def _raise_error(self) -> None:
        if isinstance(self._error, FencedError):
            raise type(self._error)(str(self._error)) from self._error
        if self._error is not None:
            raise WriterError(
                f"the log writer of rank {self._rank} failed after round {self._acknowledged}: {self._error}"
            ) from self._error

    def _check_usable(self) -> None:
        self._raise_error()
        if self._closing:
            raise WriterError(f"the log writer of rank {self._rank} is closed")

    # everything below runs in the writer thread

    def _work(self) -> None:
        try:
            while (entry := self._next()) is not None:
                if isinstance(entry, Batch):
                    self._take(entry)
                    continue
                self._write_round(entry.round)
                self._cut(entry)
        except BaseException as error:
            log.exception("the log writer of rank %d stops", self._rank)
            with self._changed:
                self._error = error
                self._queue.clear()
                self._changed.notify_all()
        finally:
            self._held.withdraw()

    def _next(self) -> Batch | Cut | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            entry = self._queue.pop()
            if 2 * self._queue.depth <= self._queue_rounds:
                # not at each place that becomes free: the two threads would take turns micro-batch by micro-batch
                self._changed.notify_all()
            return entry

    def _take(self, batch: Batch) -> None:
        records = batch.records
        if not isinstance(records, Records):
            records = records.resolve()
            self._check_origin(records, batch.round)
            if len(records) != batch.count:
                raise ValueError(f"{len(records)} records came from the device, {batch.count} were put")
        records, left_out = only_finite(records)
        with self._changed:
            self._queue.drop(batch.round, left_out, not_finite=True)
        self._unfinished.append(Batch(batch.round, len(records), records))

    def _write_round(self, round: int) -> None:
        """Move batches of rounds up to `round` to the part, and to the disk as it sees fit."""
        with self._changed:
            ready = self._queue.without_spoilt(batch for batch in self._unfinished if batch.round <= round)
        for batch in ready:
            assert isinstance(batch.records, Records)
            self._held.add(batch.round, batch.records.to_arrow(self._run))
        self._unfinished = [batch for batch in self._unfinished if batch.round > round]
        if self._held.rows:
            self._until_written(lambda: self._held.write(self._name()))

    def _name(self) -> str:
        return file_name(self._covered + 1, self._rank, self._attempt, self._sequence)

    def _cut(self, cut: Cut) -> None:
        full = cut.round - self._covered >= self._flush_rounds or self._held.bytes >= self._file_bytes
        if cut.round > self._covered and (cut.force or full):
            with self._changed:  # `put` need not wait for a commit where there is a place
                self._changed.notify_all()
            self._commit(self._covered + 1, cut.round)

    def _commit(self, first: int, last: int) -> None:
        name, finished = None, Finished(0, 0)
        rows = self._held.rows
        if rows:
            done = self._until_written(lambda: self._held.finish(self._name()))
            if done is None:  # thrown away
                rows = 0
            else:
                name, finished = done
                self._held.clear()
        with self._changed:
            dropped = self._queue.take_drops(last)
        origin = (self._rank, self._attempt, self._sequence)
        file = DataFile(name, rows, finished.size, first, last, *origin, finished.crc32, dropped)
        # may have been done although the answer was an error, so this file stays as it is: the Ledger knows repetitions
        self._until_written(lambda: self._submit(file), repeat=True)
        self._sequence += 1
        self._covered = last
        with self._changed:
            self._acknowledged = last
            self._file_total_bytes += finished.size
            self._changed.notify_all()

    def _until_written(self, act: Callable[[], T], repeat: bool = False) -> T | None:
        """Run `act` again until the disk or store takes it; None: given up by policy `stop` (not with `repeat`)."""
        pause, probe_bytes = FIRST_PAUSE_SECONDS, 0
        result: T | None = None
        while True:
            try:
                if probe_bytes:
                    self._probe(probe_bytes)
                else:
                    result = act()
            except OSError as error:
                if not may_pass(error):
                    raise
                self._held.withdraw()
                if self._policy == "stop":
                    if not repeat and not probe_bytes:
                        probe_bytes = min(max(self._held.bytes, _PROBE_BYTES[0]), _PROBE_BYTES[1])
                    self._stop_recording()
                self._wait(error, pause)
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
                continue
            with self._changed:
                self._recording = True
                self._outage.end(self._queue.dropped)
            return result

    def _wait(self, error: OSError, seconds: float) -> None:
        with self._changed:
            self._outage.begin(error, _CONSEQUENCE[self._policy], self._queue.dropped)
            self._changed.notify_all()
            if self._changed.wait_for(lambda: self._abandoned, seconds):
                raise error

    def _stop_recording(self) -> None:
        """Throw away what waits here, counted, and have `put` drop what comes."""
        with self._changed:
            self._recording = False
            self._queue.drop_waiting()
            self._queue.drop_all(self._unfinished)
            for round, count in self._held.counts.items():
                self._queue.drop(round, count)
            self._changed.notify_all()
        self._unfinished = []
        self._held.clear()

    def _probe(self, size: int) -> None:
        name = f"_tc_ray/probe-rank{self._rank}"
        try:
            self._location.write(name, bytes(size))
        finally:
            self._location.delete(name)
