"""Insertion patterns: which layers attend to the Pilot, and that one always does."""

from __future__ import annotations

import pytest

from tc_ray.models.copilot.patterns import PATTERNS, memory_layers


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
