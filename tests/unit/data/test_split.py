"""How rows divide among ranks and forward passes, against rows dealt out one at a time."""

from __future__ import annotations

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.split import micro_batches, part_of


def dealt(count: int, parts: int) -> list[list[int]]:
    """Rows in order; how many each part gets is found by dealing them out one at a time."""
    sizes = [0] * parts
    for row in range(count):
        sizes[row % parts] += 1
    rows = iter(range(count))
    return [[next(rows) for _ in range(size)] for size in sizes]


def test_parts_are_those_of_rows_dealt_out() -> None:
    for count in range(12):
        for parts in range(1, 9):
            assert [list(part_of(count, index, parts)) for index in range(parts)] == dealt(count, parts)


def test_every_row_of_a_round_is_in_one_micro_batch_of_one_rank() -> None:
    """All batch sizes that a config takes, over any number of workers: nothing over pilot.micro_batch_size, as many passes on
    every rank, and an empty one only where micro-batches of one row cannot divide the round."""
    for batch in range(1, 20):
        for workers in range(1, batch + 1):
            for micro in range(1, 7):
                pilot = {"batch_size": batch, "micro_batch_size": micro}
                config = RunConfig.model_validate({"pilot": pilot, "resources": {"pilot_workers": workers}})
                steps = config.accumulation_steps
                taken = [micro_batches(batch, rank, workers, steps) for rank in range(workers)]
                assert [row for own in taken for part in own for row in part] == list(range(batch))
                own_rows = [[row for part in own for row in part] for own in taken]
                assert own_rows == dealt(batch, workers)
                for own in taken:
                    assert len(own) == steps and len(own[0]) > 0, "a rank without a row has nothing to repeat"
                    assert max(map(len, own)) <= micro
                    assert max(map(len, own)) - min(map(len, own)) <= 1
                    assert [len(part) for part in own if part] == [len(part) for part in own][: sum(map(bool, own))]
                    assert min(map(len, own)) > 0 or (micro == 1 and batch % workers)
                    assert all(part.start > 0 for part in own if not part), "the row before stands there"


@pytest.mark.parametrize(
    ("count", "workers", "steps", "sizes"),
    [
        (16, 3, 3, [[2, 2, 2], [2, 2, 1], [2, 2, 1]]),
        (16, 7, 1, [[3], [3], [2], [2], [2], [2], [2]]),
        (4, 3, 2, [[1, 1], [1, 0], [1, 0]]),
        (12, 2, 3, [[2, 2, 2], [2, 2, 2]]),
    ],
)
def test_rounds_as_people_have_them(count: int, workers: int, steps: int, sizes: list[list[int]]) -> None:
    assert [[len(part) for part in micro_batches(count, rank, workers, steps)] for rank in range(workers)] == sizes
