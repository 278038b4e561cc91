"""Insertion patterns: which layers of a decoder-only Copilot attend to the Pilot instead of to earlier rows (table 18).

The default is the paper's best, `alternate`: layers 1, 3, 5, ... keep causal self-attention, layers 2, 4, 6, ... attend to the
memory. The other three are this project's reading of the table's alternatives.
"""

from __future__ import annotations

from collections.abc import Callable

PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "alternate": lambda layer, count: layer % 2 == 1,
    "early": lambda layer, count: layer < count // 2,
    "late": lambda layer, count: layer >= count - count // 2,
    "all": lambda layer, count: True,
}
"""(layer counted from 0, number of layers) -> the layer attends to the memory."""


def memory_layers(pattern: str, count: int) -> list[bool]:
    """For each of `count` layers, whether it attends to the memory.

    Raises:
        ValueError: an unknown pattern, or one that leaves no such layer: f would not depend on the Pilot's states.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"insertion pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
    chosen = [PATTERNS[pattern](layer, count) for layer in range(count)]
    if not any(chosen):
        raise ValueError(
            f"a Copilot of {count} layer(s) has none that attends to the Pilot under pattern {pattern!r}: "
            "take more layers (copilot.layers, copilot.every) or pattern 'all'"
        )
    return chosen
