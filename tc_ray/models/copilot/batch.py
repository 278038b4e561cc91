"""A Copilot training batch: padded tensors. One row = one target token."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from tc_ray.models.pilot.step import StepRecord


@dataclass(frozen=True)
class CopilotBatch:
    """B records padded to n target rows, Q prompt tokens and P state positions.

    question_ids: int64 [B, Q], prompt tokens. question_mask: bool [B, Q].
    rationale: bf16 [B, P, d_P], as the log holds it. rationale_position: int64 [B, P], absolute, -1 is padding.
    row_position: int64 [B, n], position of the state that predicts row i's token, -1 is padding.
    error_ids: int64 [B, n, k+1]. error_values: fp32 [B, n, k+1], zero in padding.
    question: bf16 [B, Q, d_P], X~: the encoder's output, or logged embeddings; None if it follows from question_ids.
    """

    question_ids: torch.Tensor
    question_mask: torch.Tensor
    rationale: torch.Tensor
    rationale_position: torch.Tensor
    row_position: torch.Tensor
    error_ids: torch.Tensor
    error_values: torch.Tensor
    question: torch.Tensor | None = None

    @property
    def row_mask(self) -> torch.Tensor:
        """Bool [B, n]: real target rows."""
        return self.row_position >= 0

    def to(self, device: torch.device | str) -> CopilotBatch:
        """The batch on another device."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return CopilotBatch(*(None if t is None else t.to(device, non_blocking=True) for t in tensors))

    @classmethod
    def from_step(
        cls,
        step: StepRecord,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        target_start: torch.Tensor,
        *,
        positions: str,
    ) -> CopilotBatch:
        """The batch that a log would return for a Pilot forward, on the host. Arguments: of `PilotStep.forward`; `log.positions`."""
        input_ids, lengths, target_start = input_ids.cpu(), lengths.cpu(), target_start.cpu()
        count, width = input_ids.shape
        position = torch.arange(width).expand(count, -1)
        first = torch.zeros_like(lengths) if positions == "all" else target_start - 1
        kept = (position >= first[:, None]) & (position < (lengths - 1)[:, None])
        rows = lengths - target_start
        row_mask = torch.arange(int(rows.max())) < rows[:, None]
        entries = step.errors.ids.shape[1]
        error_ids = torch.zeros(count, row_mask.shape[1], entries, dtype=torch.int64)
        error_values = torch.zeros(count, row_mask.shape[1], entries)
        error_ids[row_mask] = step.errors.ids.cpu()
        error_values[row_mask] = step.errors.values.cpu()
        question = int(target_start.max())
        return cls(
            input_ids[:, :question],
            position[:, :question] < target_start[:, None],
            step.rationale.cpu().to(torch.bfloat16),
            torch.where(kept, position, -1),
            torch.where(row_mask, (target_start - 1)[:, None] + torch.arange(row_mask.shape[1]), -1),
            error_ids,
            error_values,
            None if step.question is None else step.question[:, :question].cpu().to(torch.bfloat16),
        )
