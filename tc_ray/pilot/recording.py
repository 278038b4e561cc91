"""From one micro-batch on the device to log records: bits on the host, flat and ragged, nothing copied twice."""

from __future__ import annotations

import numpy as np
import torch

from tc_ray.mistakelog.records import Records
from tc_ray.models.pilot import StepRecord


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
) -> Records:
    """Records of one micro-batch of B examples.

    Args:
        step: what the Pilot's forward left, on its device.
        input_ids: int32 [B, S] right padded. lengths, target_start, sample_id, seen: [B].
        positions: `all` keeps states of positions 0 .. length - 2, `target` only those that predict a target token.
    """
    count, width = input_ids.shape
    lengths, target_start = lengths.astype(np.int64), target_start.astype(np.int64)
    position = np.arange(width)
    first = np.zeros(count, np.int64) if positions == "all" else target_start - 1
    kept = (position >= first[:, None]) & (position < (lengths - 1)[:, None])
    states = step.states[torch.from_numpy(kept).to(step.states.device)].to(torch.bfloat16)
    return Records(
        round=np.full(count, round_number, np.int64),
        rank=np.full(count, rank, np.int32),
        attempt=np.full(count, attempt, np.int32),
        sample_id=sample_id.astype(np.int64),
        seen=seen.astype(np.int16),
        input_ids=input_ids[position < lengths[:, None]].astype(np.int32),
        seq_offsets=_offsets(lengths),
        target_start=target_start.astype(np.int32),
        rationale=states.view(torch.int16).cpu().numpy().view(np.uint16).reshape(-1),
        rationale_offsets=_offsets(kept.sum(1)),
        rationale_layers=1,
        rationale_dim=step.states.shape[-1],
        error_ids=step.errors.ids.to(torch.int32).cpu().numpy(),
        error_values=step.errors.values.cpu().numpy(),
        error_rest=step.errors.rest.cpu().numpy(),
        token_loss=step.token_loss.cpu().numpy(),
        token_correct=step.token_correct.cpu().numpy(),
        target_offsets=_offsets(lengths - target_start),
        question=None if step.question is None else _question_bits(step.question, position, target_start),
    )


def _question_bits(question: torch.Tensor, position: np.ndarray, target_start: np.ndarray) -> np.ndarray:
    asked = torch.from_numpy(position[: question.shape[1]] < target_start[:, None]).to(question.device)
    return question[asked].to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
