"""Caches of fused decoding: the Pilot's own, with the Copilot's riding on it.

Invariant: whatever generation does to the Pilot's cache (reorder, select, crop) happens to the Copilot's, so beams and assisted
decoding keep both in step. Used by the fused models.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache


class CopilotCache:
    """What the Copilot keeps of a batch of sequences.

    rows: error rows decoded so far. question: [B, Q, d_C], memory of the question until the first row takes it in.
    self_attention, memory: keys and values of its layers, growing. visible: bool [B, M], real (not padded) memory positions.
    feedback: [B, rows, d_C]; entry i makes input row i + 1.
    """

    def __init__(self) -> None:
        self.self_attention, self.memory = DynamicCache(), DynamicCache()
        self.question: torch.Tensor | None = None
        self.visible: torch.Tensor | None = None
        self.feedback: torch.Tensor | None = None
        self.rows = 0

    def ask(self, question: torch.Tensor, visible: torch.Tensor) -> None:
        """Begin with the question's memory [B, Q, d_C], of which `visible` [B, Q] is real."""
        self.question = question
        self.see(visible)

    def see(self, visible: torch.Tensor) -> torch.Tensor:
        """Append memory positions [B, M_new]; returns all of them."""
        self.visible = visible if self.visible is None else torch.cat([self.visible, visible], 1)
        return self.visible

    def feed(self, row: torch.Tensor) -> None:
        """Append the feedback [B, 1, d_C] of the row just decoded."""
        self.feedback = row if self.feedback is None else torch.cat([self.feedback, row], 1)
        self.rows += 1

    def with_question(self, memory: torch.Tensor) -> torch.Tensor:
        """Memory [B, M, d_C] of the next row; before the first row the question's memory stands in front of it."""
        if self.question is None:
            return memory
        question, self.question = self.question, None
        return torch.cat([question, memory], 1)

    def select(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order, repeats allowed."""
        for cache in (self.self_attention, self.memory):
            cache.batch_select_indices(indices)
        self.visible = None if self.visible is None else self.visible[indices]
        self.feedback = None if self.feedback is None else self.feedback[indices]

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` tokens, each of which made one row.

        Raises ValueError: more tokens than rows: the prompt itself cannot be cropped.
        """
        if tokens > max(self.rows - 1, 0) and self.rows:
            raise ValueError(f"cannot take back {tokens} tokens: the Copilot has {self.rows} rows, one for the prompt")
        if not tokens or not self.rows:
            return
        self.self_attention.crop(-tokens)
        self.memory.crop(-tokens)
        assert self.visible is not None and self.feedback is not None
        self.visible, self.feedback = self.visible[:, :-tokens], self.feedback[:, :-tokens]
        self.rows -= tokens


class _Fused:
    """Carries a CopilotCache along with a transformers cache."""

    copilot: CopilotCache

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.copilot.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.copilot.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.copilot.crop(-tokens_to_remove)  # transformers gives a number below 0


class FusedCache(_Fused, DynamicCache):
    """Cache of a decoder-only Pilot with its Copilot's. config: of the Pilot's decoder, for its sliding layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.copilot = CopilotCache()


class FusedEncoderDecoderCache(_Fused, EncoderDecoderCache):
    """Cache of an encoder-decoder Pilot with its Copilot's. config: of the Pilot's decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(DynamicCache(config=config), DynamicCache(config=config))
        self.copilot = CopilotCache()
