"""From one micro-batch on the device to log records: chosen and packed on the device, copied to the host once.

What the log does not keep (records left out by `log.sampling`, padding, prompt positions) is dropped before the copy.
Called by the recorder between the Pilot's forward and its backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.sampling import has_mistake, in_fraction
from tc_ray.models.pilot.step import StepRecord
from tc_ray.pilot.host_copy import HostCopy, PendingRecords


def chosen_rows(
    step: StepRecord, batch: Mapping[str, np.ndarray], log: LogSection, *, seed: int, round_number: int
) -> np.ndarray | None:
    """int64 rows of the batch that `log.sampling` keeps; None: all.

    For `mistakes` two numbers a target token are read from the device, which waits for the forward pass.
    """
    if log.sampling == "fraction":
        numbers = np.full(len(batch["sample_id"]), round_number)
        return np.flatnonzero(in_fraction(log.sampling_fraction, seed, numbers, batch["sample_id"]))
    if log.sampling == "mistakes":
        offsets = _offsets(batch["lengths"] - batch["target_start"])
        correct, loss = step.token_correct.cpu().numpy(), step.token_loss.cpu().numpy()
        return np.flatnonzero(has_mistake(correct, loss, offsets, log.mistake_loss))
    return None


def to_records(
    step: StepRecord,
    *,
    input_ids: np.ndarray,
    lengths: np.ndarray,
    target_start: np.ndarray,
    sample_id: np.ndarray,
    seen: np.ndarray,
    round_number: int,
    rank: int,
    attempt: int,
    positions: str,
    rows: np.ndarray | None = None,
    dense: bool = False,
    copy: HostCopy | None = None,
) -> Records | PendingRecords:
    """Records of one micro-batch of B examples; on CUDA, records on their way to the host.

    Args:
        step: what the Pilot's forward left, on its device.
        input_ids: int32 [B, S] right padded. lengths, target_start, sample_id, seen: [B].
        positions: `all` keeps states of positions 0 .. length - 2, `target` only those that predict a target token.
        rows: int64, examples to keep, ascending; None: all.
        dense: the step's errors are those of all V tokens.
        copy: of the step's device; None: one for this call.
    """
    copy = copy or HostCopy(step.rationale.device)
    lengths, target_start = lengths.astype(np.int64), target_start.astype(np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths - target_start)
    taken = np.ones(len(lengths), bool)
    if rows is not None:
        taken = np.isin(np.arange(len(lengths)), rows)
    tokens = None if taken.all() else copy.to_device(np.flatnonzero(taken[owner]))
    position = np.arange(input_ids.shape[1])
    first = np.zeros(len(lengths), np.int64) if positions == "all" else target_start - 1
    kept = taken[:, None] & (position >= first[:, None]) & (position < (lengths - 1)[:, None])

    def of_tokens(values: torch.Tensor) -> torch.Tensor:
        return values if tokens is None else values.index_select(0, tokens)

    tensors = {
        "rationale": _at(step.rationale, kept, copy),
        "error_ids": of_tokens(step.errors.ids).to(torch.int32),
        "error_values": of_tokens(step.errors.values),
        "error_rest": of_tokens(step.errors.rest),
        "token_loss": of_tokens(step.token_loss),
        "token_correct": of_tokens(step.token_correct),
    }
    if step.question is not None:
        asked = taken[:, None] & (position[: step.question.shape[1]] < target_start[:, None])
        tensors["question"] = _at(step.question, asked, copy)
    arrays, copied = copy.arrays(tensors)
    count = int(taken.sum())
    records = Records(
        round=np.full(count, round_number, np.int64),
        rank=np.full(count, rank, np.int32),
        attempt=np.full(count, attempt, np.int32),
        sample_id=sample_id[taken].astype(np.int64),
        seen=seen[taken].astype(np.int16),
        input_ids=input_ids[taken[:, None] & (position < lengths[:, None])].astype(np.int32),
        seq_offsets=_offsets(lengths[taken]),
        target_start=target_start[taken].astype(np.int32),
        rationale_offsets=_offsets(kept.sum(1)[taken]),
        rationale_layers=step.rationale.shape[2] if step.rationale.ndim == 4 else 1,
        rationale_dim=step.rationale.shape[-1],
        target_offsets=_offsets((lengths - target_start)[taken]),
        error="dense" if dense else "top-k",
        **arrays,
    )
    return records if copied is None else PendingRecords(records, copied, round_number, rank, attempt)


def _at(states: torch.Tensor, mask: np.ndarray, copy: HostCopy) -> torch.Tensor:
    """bf16 [positions, ..] of states [B, S, ..] where the host's mask [B, S] is set: no wait for the device."""
    index = copy.to_device(np.flatnonzero(mask))
    return states.flatten(0, 1).index_select(0, index).to(torch.bfloat16)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
