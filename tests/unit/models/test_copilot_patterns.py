"""Layers of a Copilot: which it takes of its base, which of them attend to the Pilot, and that one always does."""

from __future__ import annotations

import pytest

from tc_ray.models.copilot.model import choose_layers
from tc_ray.models.copilot.stacks import PATTERNS, memory_layers


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [("alternate", [2, 4, 6]), ("early", [1, 2, 3]), ("late", [4, 5, 6]), ("all", [1, 2, 3, 4, 5, 6])],
)
def test_layers_of_a_pattern(pattern: str, numbers: list[int]) -> None:
    """Counted from 1, as docs/families.md does: every second one, the first half, the last half, every one."""
    assert [layer for layer, attends in enumerate(memory_layers(pattern, 6), 1) if attends] == numbers


def test_a_copilot_without_a_layer_for_the_pilot_is_refused() -> None:
    """f would not depend on the Pilot's states: every pattern but `all` needs two layers."""
    for pattern in PATTERNS:
        assert any(memory_layers(pattern, 2))
        if pattern == "all":
            assert memory_layers(pattern, 1) == [True]
            continue
        with pytest.raises(
            ValueError, match=rf"none that attends to the Pilot under pattern '{pattern}': take more layers"
        ):
            memory_layers(pattern, 1)
    with pytest.raises(ValueError, match="'middle' is not one of alternate, early, late, all"):
        memory_layers("middle", 4)


@pytest.mark.parametrize(
    ("layers", "every", "chosen"),
    [
        (None, 1, [0, 1, 2, 3, 4, 5, 6]),
        (None, 2, [0, 2, 4, 6]),
        (None, 3, [0, 3, 6]),
        (None, 5, [1, 6]),
        ([1, 3], 2, [1, 3]),
    ],
)
def test_every_kth_layer_is_counted_so_that_the_last_is_among_them(
    layers: list[int] | None, every: int, chosen: list[int]
) -> None:
    """Of a base of seven; `copilot.layers` says which instead."""
    assert choose_layers(layers, every, 7) == chosen
