"""The learning rate over the steps of a training, of Pilot and Copilot alike."""

from __future__ import annotations

import math
from typing import Literal


def rate_factor(
    index: int, *, steps: int, warmup_ratio: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """Factor on the peak learning rate of the 0-based step: linear warm-up, then along the schedule to 0, or at the peak."""
    warmup = max(1, round(warmup_ratio * steps))
    if index < warmup:
        return (index + 1) / warmup
    if schedule == "constant":
        return 1.0
    left = max(1, steps - warmup)
    done = min(index - warmup, left)
    return 1.0 - done / left if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done / left))
