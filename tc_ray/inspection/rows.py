"""Rows of the log as arrays over target tokens: the true token, the Pilot's first choice, and the error.

Invariant: one file is read at a time, and never the columns of hidden states, so memory does not grow with the log. Used by
the statistics, the samples and the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array, flat_column, lengths_of, offsets_of
from tc_ray.mistakelog.rows.schema import LogMetadata, LogSchemaError
from tc_ray.mistakelog.table.data_file import BadFileError

_SCALARS = ("round", "rank", "attempt", "sample_id", "seen", "target_start")
COLUMNS = [*_SCALARS, "input_ids", "error_ids", "error_values", "token_loss", "token_correct"]
"""Columns read for statistics: all but the hidden states."""
UNKNOWN = -1
"""Id of a token that the log does not hold."""
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
    target_start: Array
    """int32 [N]."""
    input_ids: Array
    """int32 [sum S]."""
    seq_offsets: Array
    """int64 [N+1] into `input_ids`."""
    target_offsets: Array
    """int64 [N+1]."""
    truth: Array
    """int32 [T], the true token."""
    error: Array
    """float32 [T], 1 - p(truth)."""
    others: Array
    """int32 [T, m], the likeliest tokens besides the true one, likeliest first; UNKNOWN where the log lists fewer."""
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
        return np.repeat(np.arange(len(self)), lengths_of(self.target_offsets))

    @property
    def position(self) -> Array:
        """int64 [T], place of each target token in its answer, from 0."""
        return np.arange(len(self.truth)) - np.repeat(self.target_offsets[:-1], lengths_of(self.target_offsets))

    @property
    def predicted(self) -> Array:
        """int32 [T], the token that the Pilot ranked first."""
        return np.where(self.correct, self.truth, self.others[:, 0])

    @property
    def p_predicted(self) -> Array:
        """float32 [T], the probability of that token."""
        return np.where(self.correct, 1.0 - self.error, self.p_others[:, 0])

    def sums(self, values: Array) -> Array:
        """float64 [N]: sums of a value of target tokens over each row."""
        totals = np.zeros(len(values) + 1, np.float64)
        np.cumsum(values, dtype=np.float64, out=totals[1:])
        return lengths_of(totals[self.target_offsets])


def stream(
    log: MistakeLog, rounds: tuple[int, int] | None = None, *, others: int = 1, samples: Sequence[int] | None = None
) -> Iterator[Rows]:
    """Rows of the log, some thousands at a time, file by file in the order of rounds.

    A file that is not what was committed, or whose rows contradict themselves, is left out whole and added to
    `log.bad_files`. Rows with a NaN or an infinity are left out and counted in `log.not_finite`.

    Args:
        rounds: first and last round, both included; None: all.
        others: tokens besides the true one that are listed for each target token (m).
        samples: only these sample ids; None: all.
    """
    wanted = None if samples is None else pa.array(np.asarray(samples, np.int64))
    for file, table in log.tables(rounds, COLUMNS):
        if wanted is not None:
            table = table.filter(pc.is_in(table["sample_id"], value_set=wanted))
        try:
            parts, left_out = [], 0
            for first in range(0, table.num_rows, _ROWS):
                piece = table.slice(first, _ROWS)
                part = decode(piece, log.metadata, others=others)
                if not part.finite.all():
                    left_out += int((~part.finite).sum())
                    part = decode(piece.filter(pa.array(part.finite)), log.metadata, others=others)
                if len(part) and (part.round.min() < file.round_min or part.round.max() > file.round_max):
                    raise LogSchemaError(f"rows of rounds outside {file.round_min} to {file.round_max}")
                parts.append(part)
        except LogSchemaError as error:
            if file.name not in {bad.name for bad in log.bad_files}:
                log.bad_files.append(BadFileError(file.name, str(error)))
            continue
        if left_out:  # the largest count, because another reading may have asked for fewer rounds
            log.not_finite[file.name] = max(left_out, log.not_finite.get(file.name, 0))
        yield from (part for part in parts if len(part))


def decode(table: pa.Table, metadata: LogMetadata, *, others: int = 1) -> Rows:
    """Rows of a table that has `COLUMNS`.

    Raises:
        LogSchemaError: a list does not fit its row.
    """
    scalars = {name: _scalar(table, name) for name in _SCALARS}
    start = scalars["target_start"]
    input_ids, seq_offsets = flat_column(table["input_ids"])
    loss, target_offsets = flat_column(table["token_loss"])
    correct, correct_offsets = flat_column(table["token_correct"])
    values, value_offsets = flat_column(table["error_values"])
    lengths = lengths_of(seq_offsets)
    _check_ids(input_ids, "input_ids", metadata)
    if len(start) and start.min() < 0:
        raise LogSchemaError(f"target_start {start.min()}")
    targets = lengths_of(target_offsets)
    if not (np.array_equal(lengths - start, targets) and np.array_equal(target_offsets, correct_offsets)):
        raise LogSchemaError("token_loss, token_correct and input_ids[target_start:] of a row differ in length")
    place = np.arange(len(input_ids)) - np.repeat(seq_offsets[:-1], lengths)
    truth = input_ids[place >= np.repeat(start, lengths)]
    dense = metadata.error == "dense"
    width = metadata.vocab_size if dense else metadata.top_k + 1
    if not np.array_equal(value_offsets, target_offsets * width):
        raise LogSchemaError(f"error_values of a row are not {width} for each target token")
    errors = values.reshape(len(loss), width)
    bad = offsets_of(~(np.isfinite(errors).all(1) & np.isfinite(loss)))
    if dense:
        error = errors[np.arange(len(truth)), truth]
        ids, probabilities = _largest(errors, others, truth=truth)
    else:
        listed, id_offsets = flat_column(table["error_ids"])
        if not np.array_equal(id_offsets, value_offsets):
            raise LogSchemaError("error_ids and error_values of a row differ in length")
        listed = listed.reshape(errors.shape)
        if len(loss) and not np.array_equal(listed[:, 0], truth):
            raise LogSchemaError("error_ids of a row do not begin with its true tokens")
        _check_ids(listed, "error_ids", metadata)
        error = errors[:, :1].flatten()  # a copy: a view would keep the whole table
        ids, probabilities = _largest(errors[:, 1:], others, ids=listed[:, 1:])
    return Rows(
        **scalars,
        input_ids=input_ids,
        seq_offsets=seq_offsets,
        target_offsets=target_offsets,
        truth=truth,
        error=error,
        others=ids,
        p_others=probabilities,
        loss=loss,
        correct=correct,
        finite=bad[target_offsets[1:]] == bad[target_offsets[:-1]],
    )


def _check_ids(ids: Array, name: str, metadata: LogMetadata) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < metadata.vocab_size:
        raise LogSchemaError(f"{name} outside 0..{metadata.vocab_size - 1}")


def _largest(values: Array, count: int, *, ids: Array | None = None, truth: Array | None = None) -> tuple[Array, Array]:
    """Ids and probabilities [T, count] of the largest -values [T, m].

    ids: [T, m], default: the columns' numbers. truth: [T], a column that does not count.
    """
    tokens, width = values.shape
    found = np.full((tokens, count), UNKNOWN, np.int32)
    probabilities = np.zeros((tokens, count), np.float32)
    kept = min(count, width if truth is None else width - 1)
    block = max(1, _BLOCK_VALUES // max(width, 1))
    for first in range(0, tokens if kept > 0 else 0, block):
        part = slice(first, first + block)
        p = -values[part]
        if truth is not None:
            p[np.arange(len(p)), truth[part]] = -np.inf
        best = np.argpartition(-p, kept - 1, axis=1)[:, :kept]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(p, best, 1), axis=1, kind="stable"), 1)
        found[part, :kept] = best if ids is None else np.take_along_axis(ids[part], best, 1)
        probabilities[part, :kept] = np.take_along_axis(p, best, 1)
    return found, probabilities


def _scalar(table: pa.Table, name: str) -> Array:
    if table[name].null_count:
        raise LogSchemaError(f"column {name}: {table[name].null_count} null values")
    return np.asarray(table[name].to_numpy())
