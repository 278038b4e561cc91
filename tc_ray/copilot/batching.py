"""From log records to a Copilot training batch. Called by the learner workers for every step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tc_ray.mistakelog.records import Records
from tc_ray.models.copilot import CopilotBatch
from tc_ray.models.taps import pooled


def pooled_records(records: Records, pooling: str) -> Records:
    """The records with one state a position; those of a log that keeps layers are pooled as a tap would have.

    Rounded to bfloat16 as a pooled log's are: of a Pilot in bfloat16 the two are the same, bit for bit.

    Args:
        pooling: `log.pooling`.
    """
    if records.rationale_layers == 1:
        return records
    states = pooled(_bfloat16(records.rationale), pooling).to(torch.bfloat16)
    return replace(records, rationale=states.view(torch.int16).numpy().view(np.uint16), rationale_layers=1)


def batch_from_records(records: Records, rows: Sequence[int] | None = None) -> CopilotBatch:
    """Pad records with one state a position (`pooled_records`) into tensors. States stay bf16, as the log holds them.

    Args:
        rows: of `records`, in this order; None: all. Cheaper than `records.select(rows)` before: one copy, not two.
    """
    if records.rationale_layers != 1:
        raise ValueError(
            f"the Copilot reads one state a position, these records hold {records.rationale_layers} layers"
        )
    chosen = np.arange(len(records)) if rows is None else np.asarray(rows, np.int64)
    count, width, entries = len(chosen), records.rationale_dim, records.error_ids.shape[1]
    lengths = np.diff(records.seq_offsets)[chosen]
    starts = records.target_start.astype(np.int64)[chosen]
    states = np.diff(records.rationale_offsets)[chosen]
    targets = np.diff(records.target_offsets)[chosen]
    question_ids = np.zeros((count, int(starts.max())), np.int64)
    state_bits = np.zeros((count, int(states.max()), width), np.uint16)
    state_position = np.full((count, int(states.max())), -1, np.int64)
    row_position = np.full((count, int(targets.max())), -1, np.int64)
    error_ids = np.zeros((count, int(targets.max()), entries), np.int64)
    error_values = np.zeros((count, int(targets.max()), entries), np.float32)
    flat = records.rationale.reshape(-1, width)
    question_bits = None if records.question is None else np.zeros((count, int(starts.max()), width), np.uint16)
    question_offsets = records.question_offsets
    for b, row in enumerate(chosen):
        first = records.seq_offsets[row]
        question_ids[b, : starts[b]] = records.input_ids[first : first + starts[b]]
        if question_bits is not None and records.question is not None:
            question_bits[b, : starts[b]] = records.question[question_offsets[row] : question_offsets[row + 1]]
        span = slice(records.rationale_offsets[row], records.rationale_offsets[row + 1])
        state_bits[b, : states[b]] = flat[span]
        # the last state stored is the one that predicts the last token: position length - 2
        state_position[b, : states[b]] = np.arange(lengths[b] - 1 - states[b], lengths[b] - 1)
        span = slice(records.target_offsets[row], records.target_offsets[row + 1])
        row_position[b, : targets[b]] = np.arange(starts[b] - 1, starts[b] - 1 + targets[b])
        error_ids[b, : targets[b]] = records.error_ids[span]
        error_values[b, : targets[b]] = records.error_values[span]
    return CopilotBatch(
        torch.from_numpy(question_ids),
        torch.arange(question_ids.shape[1]) < torch.from_numpy(starts)[:, None],
        _bfloat16(state_bits),
        torch.from_numpy(state_position),
        torch.from_numpy(row_position),
        torch.from_numpy(error_ids),
        torch.from_numpy(error_values),
        None if question_bits is None else _bfloat16(question_bits),
    )


def _bfloat16(bits: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
