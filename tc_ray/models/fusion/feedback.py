"""What the Copilot reads at inference instead of the true errors: its own f, or the realised error of the chosen token.

A strategy keeps a vector of each decoded row (`keep`: final state [B, d_C] of the Copilot, logits [B, V] of the Pilot ->
[B, 1, d_C]). Once the row's token is chosen, the next input row [B, 1, d_C] is made of it (`row`; token: int64 [B]). Neither
keeps anything of size V between rows.
"""

from __future__ import annotations

import torch

from tc_ray.models.copilot import Copilot


class OwnFeedback:
    """l_i = f_i (algorithm 2): W_in W_out is one d_C x d_C matrix, made once, so f itself is not read back."""

    def __init__(self, copilot: Copilot) -> None:
        self._copilot = copilot
        self._made_of: tuple[object, ...] = ()
        self._matrix = torch.empty(0)

    def keep(self, state: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """W_in f [B, 1, d_C]."""
        weights = (self._copilot.output.weight, self._copilot.error_projection.weight)
        # made again when weights were changed, swapped or moved; writes through `.data` are not noticed
        now = (*((weight._version, weight.data_ptr()) for weight in weights), state.device, state.dtype)
        if now != self._made_of:
            self._matrix, self._made_of = self._copilot.feedback_matrix().to(state), now
        return (state @ self._matrix.T)[:, None]

    def row(self, kept: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """As kept: f does not depend on the chosen token."""
        return kept


class RealisedFeedback:
    """l_i = onehot(chosen token) - p^_i: safer if the Copilot lags, at the cost of reading E."""

    def __init__(self, copilot: Copilot) -> None:
        self._copilot = copilot

    def keep(self, state: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """E^T p^ [B, 1, d_C]."""
        table = self._copilot.error_table
        common = min(len(table), logits.shape[-1])
        expected = logits.float().softmax(-1)[:, :common].to(table.dtype) @ table[:common]
        return expected[:, None]

    def row(self, kept: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """A (E[token] - E^T p^)."""
        table = self._copilot.error_table
        # an id past the Copilot's vocabulary is padding of the Pilot's: never chosen, and without a row in E
        known = (token < len(table))[:, None, None]
        chosen = table[token.clamp_max(len(table) - 1)][:, None] * known
        row: torch.Tensor = self._copilot.error_projection(chosen - kept)
        return row


Feedback = OwnFeedback | RealisedFeedback
STRATEGIES: dict[str, type[Feedback]] = {"own": OwnFeedback, "realised": RealisedFeedback}
