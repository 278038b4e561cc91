"""From log records to a Copilot training batch. Called for every step, by `worker` and `from_log`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tc_ray.mistakelog.rows.records import Records
from tc_ray.models.copilot import CopilotBatch
from tc_ray.models.pilot.taps import pooled


def pooled_records(records: Records, pooling: str) -> Records:
    """The records with one state per position, in bfloat16: layers are pooled as `LayerTap` does it (same bits for a bf16 Pilot)."""
    if records.rationale_layers == 1:
        return records
    states = pooled(_bfloat16(records.rationale), pooling).to(torch.bfloat16)
    return replace(records, rationale=states.view(torch.int16).numpy().view(np.uint16), rationale_layers=1)


def batch_from_records(records: Records, rows: Sequence[int] | None = None) -> CopilotBatch:
    """Pad records with one state per position (`pooled_records`) into tensors. rows: of them, in this order; None: all."""
    if records.rationale_layers != 1:
        raise ValueError(
            f"the Copilot reads one state per position, these records hold {records.rationale_layers} layers"
        )
    chosen = np.arange(len(records)) if rows is None else np.asarray(rows, np.int64)
    lengths = np.diff(records.seq_offsets)[chosen]
    starts = records.target_start.astype(np.int64)[chosen]
    counts = np.diff(records.rationale_offsets)[chosen]
    targets = np.diff(records.target_offsets)[chosen]
    first_target = records.target_offsets[chosen]
    question = None
    if records.question is not None:
        question = _bfloat16(_padded(records.question, records.question_offsets[chosen], starts))
    return CopilotBatch(
        torch.from_numpy(_padded(records.input_ids, records.seq_offsets[chosen], starts, np.int64)),
        torch.from_numpy(np.arange(starts.max()) < starts[:, None]),
        _bfloat16(_padded(records.rationale[:, 0], records.rationale_offsets[chosen], counts)),
        # the last state stored predicts the last token: position length - 2
        torch.from_numpy(_positions(lengths - 1 - counts, counts)),
        torch.from_numpy(_positions(starts - 1, targets)),
        torch.from_numpy(_padded(records.error_ids, first_target, targets, np.int64)),
        torch.from_numpy(_padded(records.error_values, first_target, targets)),
        question,
    )


def _padded(
    flat: np.ndarray, first: np.ndarray, lengths: np.ndarray, dtype: type[np.generic] | None = None
) -> np.ndarray:
    """[B, longest, ...]: `lengths[b]` values of `flat` from `first[b]` on, then zeros."""
    # only the padding is zeroed, and slices have plain ints: for rows of 100 kB either would cost as much as the copy
    longest = int(lengths.max())
    padded = np.empty((len(lengths), longest, *flat.shape[1:]), dtype or flat.dtype)
    for row, start, length in zip(padded, first.tolist(), lengths.tolist(), strict=True):
        row[:length] = flat[start : start + length]
        if length < longest:
            row[length:] = 0
    return padded


def _positions(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [B, longest]: `lengths[b]` positions from `first[b]` on, then -1."""
    place = np.arange(lengths.max())
    return np.where(place < lengths[:, None], first[:, None] + place, -1)


def _bfloat16(bits: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
