"""The record writer of one Pilot worker: a bounded queue and one thread between the training step and the disk.

Invariant: a data file holds whole rounds of one rank, in order, and is handed to the Ledger only when it is complete and
on disk; `flush` returns only after the Ledger acknowledged. The step waits for the disk only when the queue is full, or
not at all by policy, and both are counted. Called by the Pilot's loop: `put` a micro-batch, `end_round`, and at
checkpoints `flush`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tc_ray.mistakelog.datafile import (
    TEMPORARY_SUFFIX,
    Compression,
    DataFile,
    ParquetPart,
    file_name,
    temporary_name,
)
from tc_ray.mistakelog.ledger import FencedError
from tc_ray.mistakelog.records import Records

log = logging.getLogger(__name__)


class WriterError(RuntimeError):
    """The writer thread has failed; its cause is chained. Nothing after the last acknowledged round is in the log."""


@dataclass(frozen=True)
class _Cut:
    """Queue entry: `round` has ended; cut now if `force`, else when the limits say so."""

    round: int
    force: bool


class RecordWriter:
    """Writes the records of one rank in one attempt.

    Args:
        path: folder of the Delta table.
        submit: hands a finished file to the Ledger and returns the table version; called in the writer thread.
        run: value of the `run` column.
        rank: of this Pilot worker.
        attempt: as returned by `Ledger.begin_attempt`.
        flush_rounds: a file is cut at least every this many rounds.
        file_bytes: a file is cut at the end of the round in which its records pass this size in memory.
        queue_rounds: micro-batches that may wait for the thread; it holds those of one more round.
        full_policy: queue full: `block` waits, `subsample` drops the micro-batch's records; both are counted.
        compression: of the Parquet pages.
        start_round: last round already in the log for this attempt: the watermark given to `begin_attempt`.
    """

    def __init__(
        self,
        path: str | Path,
        submit: Callable[[DataFile], int],
        *,
        run: str,
        rank: int,
        attempt: int,
        flush_rounds: int,
        file_bytes: int,
        queue_rounds: int,
        full_policy: Literal["block", "subsample"] = "block",
        compression: Compression = "none",
        start_round: int = 0,
    ) -> None:
        self._folder = Path(path).absolute()
        self._submit, self._run, self._rank, self._attempt = submit, run, rank, attempt
        self._flush_rounds, self._file_bytes, self._queue_rounds = flush_rounds, file_bytes, queue_rounds
        self._policy, self._compression = full_policy, compression

        self._changed = threading.Condition()
        # shared with the thread, under _changed
        self._queue: deque[Records | _Cut] = deque()
        self._depth = 0
        self._error: BaseException | None = None
        self._closing = False
        self._acknowledged = start_round
        self._file_total_bytes = 0
        # the caller's side
        self._ended = start_round
        self._records = 0
        self._dropped = 0
        self._blocked_seconds = 0.0
        # the thread's side
        self._part: ParquetPart | None = None
        # records of the round that has not ended: kept out of the file, which may be cut before they are complete
        self._unfinished: list[Records] = []
        self._sequence = 0
        self._covered = start_round

        self._remove_leftovers()
        self._thread = threading.Thread(target=self._work, name=f"mistake-log-writer-{rank}", daemon=True)
        self._thread.start()

    def _remove_leftovers(self) -> None:
        """Unfinished files of this rank's earlier attempts: their writers are dead or fenced."""
        for leftover in self._folder.glob(f"rank{self._rank}-a*{TEMPORARY_SUFFIX}"):
            if int(leftover.name.split("-")[1][1:]) < self._attempt:
                leftover.unlink(missing_ok=True)

    def put(self, records: Records, round: int) -> bool:
        """Queue one micro-batch of `round`. Its arrays must not change afterwards: they are written without a copy.

        Returns:
            False if the queue was full and the records were dropped (policy subsample).

        Raises:
            ValueError: the records are of another round, rank or attempt, or of a round already ended.
            FencedError, WriterError: the writer thread has stopped.
        """
        stray = (records.round != round) | (records.rank != self._rank) | (records.attempt != self._attempt)
        if stray.any():
            raise ValueError(f"records are not all of round {round}, rank {self._rank}, attempt {self._attempt}")
        if round != self._ended + 1:
            raise ValueError(f"records of round {round}, but round {self._ended} was the last to end")
        with self._changed:
            self._check_usable()
            if self._depth >= self._queue_rounds:
                if self._policy == "subsample":
                    self._dropped += len(records)
                    return False
                started = time.monotonic()
                self._changed.wait_for(lambda: self._depth < self._queue_rounds or self._error is not None)
                self._blocked_seconds += time.monotonic() - started
                self._raise_error()
            self._queue.append(records)
            self._depth += 1
            self._records += len(records)
            self._changed.notify_all()
        return True

    def end_round(self, round: int) -> None:
        """All of this rank's micro-batches of `round` were put (possibly none).

        Raises:
            ValueError: not the round after the last one.
            FencedError, WriterError: the writer thread has stopped.
        """
        if round != self._ended + 1:
            raise ValueError(f"end of round {round}, but round {self._ended} was the last to end")
        with self._changed:
            self._check_usable()
            self._queue.append(_Cut(round, force=False))
            self._changed.notify_all()
        self._ended = round

    def flush(self, round: int) -> None:
        """Cut a file now and wait until the Ledger has acknowledged everything up to `round`.

        Raises:
            ValueError: `round` has not ended.
            FencedError, WriterError: the writer thread has stopped.
        """
        if round > self._ended:
            raise ValueError(f"flush of round {round}, but the last ended round is {self._ended}")
        with self._changed:
            self._check_usable()
            if self._acknowledged >= round:
                return
            self._queue.append(_Cut(self._ended, force=True))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._acknowledged >= round or self._error is not None)
            self._raise_error()

    def close(self) -> None:
        """Commit all ended rounds, drop the records of a round that has not ended, stop the thread.

        Raises:
            FencedError, WriterError: the writer thread had stopped with an error.
        """
        with self._changed:
            if self._error is None and not self._closing:
                self._queue.append(_Cut(self._ended, force=True))
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._raise_error()

    def stats(self) -> dict[str, float]:
        """Counts since this writer was made.

        records (accepted by `put`), dropped_records (queue full, policy subsample), bytes (of acknowledged files),
        blocked_seconds (`put` waiting for a full queue, policy block), queue_depth (micro-batches waiting now),
        acknowledged_round (last round that the Ledger has acknowledged).
        """
        with self._changed:
            return {
                "records": self._records,
                "dropped_records": self._dropped,
                "bytes": self._file_total_bytes,
                "blocked_seconds": self._blocked_seconds,
                "queue_depth": self._depth,
                "acknowledged_round": self._acknowledged,
            }

    def _raise_error(self) -> None:
        if isinstance(self._error, FencedError):
            raise FencedError(str(self._error)) from self._error
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
                if isinstance(entry, Records):
                    self._unfinished.append(entry)
                    continue
                if not entry.force:
                    self._write_round()
                self._cut(entry)
        except BaseException as error:
            log.exception("the log writer of rank %d stops", self._rank)
            with self._changed:
                self._error = error
                self._queue.clear()
                self._depth = 0
                self._changed.notify_all()
        finally:
            if self._part is not None:
                self._part.abort()

    def _next(self) -> Records | _Cut | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            entry = self._queue.popleft() if self._queue else None
            if isinstance(entry, Records):
                self._depth -= 1
                self._changed.notify_all()
            return entry

    def _write_round(self) -> None:
        for records in self._unfinished:
            if len(records):
                if self._part is None:
                    name = temporary_name(self._rank, self._attempt, self._sequence)
                    self._part = ParquetPart(self._folder, name, self._compression, records.arrow_metadata())
                self._part.write(records.to_arrow(self._run))
        self._unfinished = []

    def _cut(self, cut: _Cut) -> None:
        size = self._part.bytes if self._part is not None else 0
        full = cut.round - self._covered >= self._flush_rounds or size >= self._file_bytes
        if cut.round > self._covered and (cut.force or full):
            self._commit(self._covered + 1, cut.round)

    def _commit(self, first: int, last: int) -> None:
        name, rows, size, sha256 = None, 0, 0, ""
        if self._part is not None:
            name = file_name(first, last, self._rank, self._attempt, self._sequence)
            rows = self._part.rows
            size, sha256 = self._part.finish(name)
            self._part = None
        self._submit(DataFile(name, rows, size, first, last, self._rank, self._attempt, self._sequence, sha256))
        self._sequence += 1
        self._covered = last
        with self._changed:
            self._acknowledged = last
            self._file_total_bytes += size
            self._changed.notify_all()
