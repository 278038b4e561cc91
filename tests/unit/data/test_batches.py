"""Order of rows over rounds, and padding."""

from __future__ import annotations

import numpy as np
import pytest

from tc_ray.data.prepared.batches import RoundOrder, collate
from tc_ray.data.source.records import DataError


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(10, 4, 3), (16, 4, 2), (7, 7, 3), (5, 4, 9), (100, 16, 1)])
def test_each_row_once_an_epoch_and_never_twice_a_round(rows: int, batch: int, epochs: int) -> None:
    for seed in range(5):
        order = RoundOrder(rows, batch, epochs, seed)
        assert order.rounds == epochs * rows // batch
        used: dict[int, list[int]] = {row: [] for row in range(rows)}
        for round in range(1, order.rounds + 1):
            taken, seen = order.sample_rows(round), order.seen(round)
            assert taken.shape == seen.shape == (batch,) and seen.dtype == np.int16
            assert len(set(taken.tolist())) == batch
            for row, times in zip(taken.tolist(), seen.tolist(), strict=True):
                used[row].append(times)
        dropped = epochs * rows - order.rounds * batch
        assert all(times == list(range(len(times))) for times in used.values())
        assert sum(epochs - len(times) for times in used.values()) == dropped


def test_restart_needs_only_the_round() -> None:
    one, again, other = RoundOrder(50, 8, 2, 3), RoundOrder(50, 8, 2, 3), RoundOrder(50, 8, 2, 4)
    assert np.array_equal(one.sample_rows(9), again.sample_rows(9))
    assert not np.array_equal(one.sample_rows(9), other.sample_rows(9))
    assert not np.array_equal(one.sample_rows(1), one.sample_rows(7))
    # More epochs later leave the earlier rounds as they were.
    longer = RoundOrder(50, 8, 5, 3)
    assert all(np.array_equal(one.sample_rows(r), longer.sample_rows(r)) for r in range(1, one.rounds + 1))


def test_order_refuses_what_it_cannot_do() -> None:
    with pytest.raises(DataError, match=r"pilot\.batch_size 4"):
        RoundOrder(3, 4, 1, 0)
    for round in (0, 3):
        with pytest.raises(IndexError):
            RoundOrder(8, 4, 1, 0).sample_rows(round)


def test_collate_pads_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "target_start": 1, "sample_id": 3},
        {"input_ids": [8], "target_start": 1, "sample_id": 2**40},
    ]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["lengths"].tolist() == [3, 1]
    assert batch["target_start"].tolist() == [1, 1]
    assert batch["sample_id"].tolist() == [3, 2**40]
    assert all(array.dtype == np.int64 for array in batch.values())
