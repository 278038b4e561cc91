"""Numbers that are not finite (NaN, infinity): found in weights, and steps with them counted in training.

Invariant: weights with such a number are neither stored as complete nor loaded; a step that would make them is left out, and
ten such steps in a row end the training. Used by the training of Pilot and Copilot, their checkpoints and exports, and every
loader.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

MOST_IN_A_ROW = 10
"""Steps left out in a row that end a training: the weights themselves must be spoilt."""


class NotFiniteError(ValueError):
    """Weights, or every step of a training, hold NaN or infinity; the message says which."""


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor with a NaN or an infinity. One pass over each, without a copy; meta tensors are skipped."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        # both are NaN if one number is
        low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().float())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return name
    return None


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raise NotFiniteError that names the place and the first tensor with a NaN or an infinity."""
    name = first_not_finite(tensors)
    if name is not None:
        raise NotFiniteError(f"{where}: the weight {name} holds numbers that are not finite (NaN or infinity)")


class LeftOut:
    """Counts steps left out because their loss or gradient was not finite. what: the training; advice: for the error."""

    def __init__(self, what: str, advice: str) -> None:
        self._what, self._advice = what, advice
        self.count = 0
        """Left out so far."""
        self._in_a_row = 0

    def add(self, finite: bool, loss: float) -> bool:
        """Count the next step; returns whether it is the first in a row that is left out.

        Raises:
            NotFiniteError: MOST_IN_A_ROW steps were left out in a row.
        """
        if finite:
            self._in_a_row = 0
            return False
        self.count += 1
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise NotFiniteError(
                f"{self._what}: loss or gradient was not finite {self._in_a_row} times in a row (the last loss: {loss}); "
                f"{self._advice}"
            )
        return self._in_a_row == 1
