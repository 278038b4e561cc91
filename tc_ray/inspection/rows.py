"""Rows of the log as numbers about target tokens: what was true, what the Pilot would have said, how far off it was.

Invariant: one file is read at a time, and never the columns of hidden states, so that memory does not grow with the log. Used by the statistics, the coloured sequences, the report and the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.schema import LogMetadata, LogSchemaError
from tc_ray.mistakelog.table.data_file import BadFileError

Array = npt.NDArray[Any]

COLUMNS = [
    "round",
    "rank",
    "attempt",
    "sample_id",
    "seen",
    "input_ids",
    "target_start",
    "error_ids",
    "error_values",
    "token_loss",
    "token_correct",
]
"""Columns read for statistics: all but the hidden states."""
UNKNOWN = -1
"""Id of a token that the log does not tell."""
_BLOCK_VALUES = 1 << 22
_ROWS = 4096


@dataclass(frozen=True)
class Rows:
    """N rows with T target tokens in all; row i owns `target_offsets[i]:target_offsets[i+1]` of the T."""

    round: Array
    """int64 [N]."""
    rank: Array
    attempt: Array
    sample_id: Array
    """int64 [N]."""
    seen: Array
    """int16 [N], how often the Pilot had trained on the sample before."""
    input_ids: Array
    """int32 [sum S]."""
    seq_offsets: Array
    """int64 [N+1] into `input_ids`."""
    target_start: Array
    """int32 [N]."""
    target_offsets: Array
    """int64 [N+1]."""
    truth: Array
    """int32 [T], the true token."""
    error: Array
    """float32 [T], 1 - p(truth): the share of probability that was not on the true token."""
    others: Array
    """int32 [T, m], the likeliest tokens besides the true one, likeliest first; -1 where the log lists fewer."""
    p_others: Array
    """float32 [T, m], their probabilities; 0 where the log lists fewer."""
    loss: Array
    """float32 [T], nats."""
    correct: Array
    """bool [T], the true token was ranked first."""
    finite: Array
    """bool [N], no error and no loss of the row is NaN or infinite."""

    def __len__(self) -> int:
        return len(self.round)

    @property
    def row(self) -> Array:
        """int64 [T], the row that each target token belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.target_offsets))

    @property
    def position(self) -> Array:
        """int64 [T], place of each target token in its answer, from 0."""
        return np.arange(len(self.truth)) - np.repeat(self.target_offsets[:-1], np.diff(self.target_offsets))

    @property
    def said(self) -> Array:
        """int32 [T], the token that the Pilot ranked first."""
        return np.where(self.correct, self.truth, self.others[:, 0])

    @property
    def p_said(self) -> Array:
        """float32 [T], the probability of that token."""
        return np.where(self.correct, 1.0 - self.error, self.p_others[:, 0])

    def sums(self, values: Array) -> Array:
        """float64 [N]: sums of a value of target tokens over each row."""
        totals = np.zeros(len(values) + 1, np.float64)
        np.cumsum(values, dtype=np.float64, out=totals[1:])
        return np.diff(totals[self.target_offsets])


def stream(
    log: MistakeLog, rounds: tuple[int, int] | None = None, *, others: int = 1, samples: Sequence[int] | None = None
) -> Iterator[Rows]:
    """Rows of the log, some thousands at a time, file by file in the order of rounds.

    A file that is not what was committed, or whose rows contradict themselves, is passed over whole and stands in
    `log.bad_files`. Rows with a NaN or an infinity are passed over and counted in `log.not_finite`.

    Args:
        rounds: first and last round, both included; None: all.
        others: tokens besides the true one that are told of each target token (m).
        samples: only these sample ids; None: all.
    """
    wanted = None if samples is None else pa.array(np.asarray(samples, np.int64))
    for file, table in log.tables(rounds, COLUMNS):
        if wanted is not None:
            table = table.filter(pc.is_in(table["sample_id"], value_set=wanted))
        try:
            parts, left_out = [], 0
            for batch in table.to_batches(max_chunksize=_ROWS):
                part = decode(batch, log.metadata, others=others)
                if not part.finite.all():
                    left_out += int((~part.finite).sum())
                    part = decode(batch.filter(pa.array(part.finite)), log.metadata, others=others)
                parts.append(part)
            for part in parts:
                if len(part) and (part.round.min() < file.round_min or part.round.max() > file.round_max):
                    raise LogSchemaError(f"rows of rounds outside {file.round_min} to {file.round_max}")
        except LogSchemaError as error:
            if file.name not in {bad.name for bad in log.bad_files}:
                log.bad_files.append(BadFileError(file.name, str(error)))
            continue
        if left_out:  # of one reading: another may have asked for other rounds
            log.not_finite[file.name] = max(left_out, log.not_finite.get(file.name, 0))
        yield from (part for part in parts if len(part))


def decode(batch: pa.RecordBatch, metadata: LogMetadata, *, others: int = 1) -> Rows:
    """Rows of one Arrow batch that has `COLUMNS`.

    Raises:
        LogSchemaError: a list of the batch does not fit its row.
    """
    input_ids, seq_offsets = flat(batch, "input_ids")
    loss, target_offsets = flat(batch, "token_loss")
    correct, correct_offsets = flat(batch, "token_correct")
    values, value_offsets = flat(batch, "error_values")
    start = scalar(batch, "target_start")
    lengths = np.diff(seq_offsets)
    if len(input_ids) and not 0 <= input_ids.min() <= input_ids.max() < metadata.vocab_size:
        raise LogSchemaError(f"input_ids outside 0..{metadata.vocab_size - 1}")
    if len(start) and start.min() < 0:
        raise LogSchemaError(f"target_start {start.min()}")
    if not (
        np.array_equal(lengths - start, np.diff(target_offsets)) and np.array_equal(target_offsets, correct_offsets)
    ):
        raise LogSchemaError("token_loss, token_correct and input_ids[target_start:] of a row differ in length")
    place = np.arange(len(input_ids)) - np.repeat(seq_offsets[:-1], lengths)
    truth = input_ids[place >= np.repeat(start, lengths)]
    width = metadata.vocab_size if metadata.error == "dense" else _width(values, loss)
    if not np.array_equal(value_offsets, target_offsets * width):
        raise LogSchemaError(f"error_values of a row are not {width} for each target token")
    table = values.reshape(len(loss), width)
    bad = np.concatenate([[0], np.cumsum(~(np.isfinite(table).all(1) & np.isfinite(loss)))])
    if metadata.error == "dense":
        error = table[np.arange(len(truth)), truth]
        ids, probabilities = _largest(table, None, truth, others)
    else:
        ids_flat, id_offsets = flat(batch, "error_ids")
        if not np.array_equal(id_offsets, value_offsets):
            raise LogSchemaError("error_ids and error_values of a row differ in length")
        listed = ids_flat.reshape(len(loss), width)
        if not np.array_equal(listed[:, 0], truth):
            raise LogSchemaError("error_ids of a row do not begin with its true tokens")
        if listed.size and not 0 <= listed.min() <= listed.max() < metadata.vocab_size:
            raise LogSchemaError(f"error_ids outside 0..{metadata.vocab_size - 1}")
        error = table[:, 0].copy()  # a view would keep the whole table
        ids, probabilities = _largest(table[:, 1:], listed[:, 1:], None, others)
    return Rows(
        round=scalar(batch, "round"),
        rank=scalar(batch, "rank"),
        attempt=scalar(batch, "attempt"),
        sample_id=scalar(batch, "sample_id"),
        seen=scalar(batch, "seen"),
        input_ids=input_ids,
        seq_offsets=seq_offsets,
        target_start=start,
        target_offsets=target_offsets,
        truth=truth,
        error=error,
        others=ids,
        p_others=probabilities,
        loss=loss,
        correct=correct,
        finite=bad[target_offsets[1:]] == bad[target_offsets[:-1]],
    )


def _width(values: Array, loss: Array) -> int:
    """Entries a target token, k + 1: from the data, as k may have been chosen after the metadata was read."""
    if len(loss) == 0:
        return 1
    if len(values) % len(loss) or len(values) == 0:
        raise LogSchemaError(f"{len(values)} error_values for {len(loss)} target tokens")
    return len(values) // len(loss)


def _largest(values: Array, ids: Array | None, truth: Array | None, count: int) -> tuple[Array, Array]:
    """Ids and probabilities [T, count] of the largest -values; `ids` None: the columns' own numbers, `truth` left out."""
    tokens, width = values.shape
    found = np.full((tokens, count), UNKNOWN, np.int32)
    probabilities = np.zeros((tokens, count), np.float32)
    kept = min(count, width if truth is None else width - 1)
    block = max(1, _BLOCK_VALUES // max(width, 1))
    for first in range(0, tokens if kept > 0 else 0, block):
        part = -values[first : first + block]
        rows = np.arange(len(part))
        if truth is not None:
            part[rows, truth[first : first + block]] = -np.inf
        if kept == 1:
            best = part.argmax(1)[:, None]
        else:
            best = np.argpartition(-part, kept - 1, axis=1)[:, :kept]
            best = np.take_along_axis(best, np.argsort(-np.take_along_axis(part, best, 1), axis=1, kind="stable"), 1)
        found[first : first + block, :kept] = (
            best if ids is None else np.take_along_axis(ids[first : first + block], best, 1)
        )
        probabilities[first : first + block, :kept] = np.take_along_axis(part, best, 1)
    return found, probabilities


def scalar(batch: pa.RecordBatch, name: str) -> Array:
    """A column of numbers.

    Raises:
        LogSchemaError: it holds nulls.
    """
    column = batch.column(name)
    if column.null_count:
        raise LogSchemaError(f"column {name}: {column.null_count} null values")
    return np.asarray(column.to_numpy(zero_copy_only=False))


def flat(batch: pa.RecordBatch, name: str) -> tuple[Array, Array]:
    """Values and int64 offsets [N+1] of a list column.

    Raises:
        LogSchemaError: it holds nulls.
    """
    column = batch.column(name)
    if column.null_count:
        raise LogSchemaError(f"column {name}: {column.null_count} null lists")
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values[int(offsets[0]) : int(offsets[-1])].to_numpy(zero_copy_only=False)
    return values, offsets - offsets[0]
