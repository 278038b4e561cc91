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

_SCALARS = ("round", "sample_id", "seen", "target_start")
COLUMNS = [*_SCALARS, "input_ids", "error_ids", "error_values", "token_loss", "token_correct"]
"""Columns that are read: all but the hidden states."""
UNKNOWN = -1
"""Id of a token that the log does not hold."""
_ROWS = 512


@dataclass(frozen=True)
class Rows:
    """N rows with T target tokens in all; row i owns `target_offsets[i]:target_offsets[i+1]` of the T.

    round, sample_id int64 [N]; seen int16 [N], how often the Pilot had trained on the sample before; target_start int32 [N];
    input_ids int32 [sum S], cut by seq_offsets int64 [N+1]; truth int32 [T], the true token; error float32 [T], 1 - p(truth);
    others int32 [T, m], the likeliest tokens besides the true one, likeliest first (UNKNOWN where the log lists fewer), and
    p_others float32 [T, m], their probabilities; loss float32 [T], nats; correct bool [T], the true token was ranked first.
    """

    round: Array
    sample_id: Array
    seen: Array
    target_start: Array
    input_ids: Array
    seq_offsets: Array
    target_offsets: Array
    truth: Array
    error: Array
    others: Array
    p_others: Array
    loss: Array
    correct: Array

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
    """Rows of the log, some hundreds at a time, file by file in the order of rounds.

    A file that is not what was committed is left out whole and added to `log.bad_files`. Rows with a NaN or an infinity are
    left out and counted in `log.not_finite`.

    Args:
        rounds: first and last round, both included; None: all.
        others: tokens besides the true one that are listed for each target token (m).
        samples: only these sample ids; None: all.

    Raises LogSchemaError: rows of a file contradict themselves.
    """
    for file, table in log.tables(rounds, COLUMNS):
        if samples is not None:
            table = table.filter(pc.is_in(table["sample_id"], value_set=pa.array(samples, pa.int64())))
        finite = _finite(table)
        if not finite.all():  # the largest count, because another reading may have asked for fewer rounds
            log.not_finite[file.name] = max(int((~finite).sum()), log.not_finite.get(file.name, 0))
            table = table.filter(pa.array(finite))
        for first in range(0, table.num_rows, _ROWS):
            try:
                yield _decode(table.slice(first, _ROWS), log.metadata, others)
            except LogSchemaError as error:
                raise LogSchemaError(f"{file.name}: {error}") from None


def _finite(table: pa.Table) -> Array:
    """bool [N]: no error and no loss of the row is NaN or infinite."""
    fine = np.ones(table.num_rows, bool)
    for name in ("error_values", "token_loss"):
        values, offsets = flat_column(table[name])
        bad = offsets_of(~np.isfinite(values))
        fine &= bad[offsets[1:]] == bad[offsets[:-1]]
    return fine


def _decode(table: pa.Table, metadata: LogMetadata, others: int) -> Rows:
    scalars = {name: np.asarray(table[name].to_numpy()) for name in _SCALARS}
    input_ids, seq_offsets = flat_column(table["input_ids"])
    loss, target_offsets = flat_column(table["token_loss"])
    correct, correct_offsets = flat_column(table["token_correct"])
    values, value_offsets = flat_column(table["error_values"])
    lengths = lengths_of(seq_offsets)
    dense = metadata.error == "dense"
    width = metadata.vocab_size if dense else metadata.top_k + 1
    fits = np.array_equal(lengths - scalars["target_start"], lengths_of(target_offsets))
    if not (fits and np.array_equal(target_offsets, correct_offsets)):
        raise LogSchemaError("token_loss, token_correct and input_ids[target_start:] of a row differ in length")
    if not np.array_equal(value_offsets, target_offsets * width):
        raise LogSchemaError(f"error_values of a row are not {width} for each target token")
    place = np.arange(len(input_ids)) - np.repeat(seq_offsets[:-1], lengths)
    truth = input_ids[place >= np.repeat(scalars["target_start"], lengths)]
    errors = values.reshape(len(loss), width).copy()
    listed = None if dense else flat_column(table["error_ids"])[0].reshape(errors.shape)
    if listed is not None and not np.array_equal(listed[:, 0], truth):
        raise LogSchemaError("error_ids of a row do not begin with its true tokens")
    every = np.arange(len(truth))
    best = truth if listed is None else np.zeros_like(truth)
    error = errors[every, best]
    ids = np.full((len(truth), others), UNKNOWN, np.int32)
    probabilities = np.zeros((len(truth), others), np.float32)
    for rank in range(min(others, width - 1)):  # errors of other tokens are -p
        errors[every, best] = np.inf
        best = errors.argmin(1)
        ids[:, rank] = best if listed is None else listed[every, best]
        probabilities[:, rank] = -errors[every, best]
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
    )
