"""Order of rows over rounds, and padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import RoundOrder, TrainTable, collate
from tc_ray.data.prepared.folder import SCHEMA
from tc_ray.data.source.records import DataError


def lengths_of(rows: int) -> np.ndarray:
    """Lengths as of real sentences: many short, few long."""
    return np.random.default_rng(2).geometric(0.02, rows) + 10


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("rows", "batch", "epochs"), [(10, 4, 3), (16, 4, 2), (7, 7, 3), (5, 4, 9), (100, 16, 1)])
def test_each_row_once_an_epoch_and_never_twice_a_round(rows: int, batch: int, epochs: int, grouped: bool) -> None:
    for seed in range(5):
        order = RoundOrder(rows, batch, epochs, seed, lengths=lengths_of(rows) if grouped else None)
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


@pytest.mark.parametrize("lengths", [None, lengths_of(50)])
def test_restart_needs_only_the_round(lengths: np.ndarray | None) -> None:
    one, again, other = (RoundOrder(50, 8, 2, seed, lengths=lengths) for seed in (3, 3, 4))
    assert np.array_equal(one.sample_rows(9), again.sample_rows(9))
    assert not np.array_equal(one.sample_rows(9), other.sample_rows(9))
    assert not np.array_equal(one.sample_rows(1), one.sample_rows(7))
    # More epochs later leave the earlier rounds as they were.
    longer = RoundOrder(50, 8, 5, 3, lengths=lengths)
    assert all(np.array_equal(one.sample_rows(r), longer.sample_rows(r)) for r in range(1, one.rounds + 1))


def test_grouped_rounds_are_of_like_lengths_and_come_in_any_order() -> None:
    """Against the definition, slowly: the rows of each fifty rounds, sorted and cut, are the rounds; which comes when is chance."""
    rows, batch = 1610, 8  # 201 rounds, and two rows that none takes
    lengths = lengths_of(rows)
    order = RoundOrder(rows, batch, 1, 3, lengths=lengths)
    drawn, wanted = np.random.default_rng([3, 0]).permutation(rows)[: 201 * batch], []
    for at in range(0, len(drawn), 50 * batch):
        near = sorted(drawn[at : at + 50 * batch].tolist(), key=lambda row: lengths[row])
        wanted += [near[first : first + batch] for first in range(0, len(near), batch)]
    found = [order.sample_rows(number).tolist() for number in range(1, 202)]
    assert sorted(found) == sorted(wanted) and found != wanted
    means = [lengths[one].mean() for one in found]
    assert abs(np.corrcoef(means, np.arange(201))[0, 1]) < 0.2


def test_grouped_rounds_have_less_padding_in_every_epoch() -> None:
    """A tenth of the cells at most, where rounds of any lengths have more than half."""
    rows, batch = 1610, 8
    lengths = lengths_of(rows)
    for given, low, high in ((None, 0.5, 0.8), (lengths, 0.0, 0.1)):
        order = RoundOrder(rows, batch, 3, 3, lengths=given)
        for first in (1, 203, 405):
            taken = [lengths[order.sample_rows(number)] for number in range(first, first + 199)]
            cells = sum(batch * int(one.max()) for one in taken)
            assert low < 1 - sum(map(np.sum, taken)) / cells < high


def test_a_run_s_order_is_grouped_where_it_asks_for_that(tmp_path: Path) -> None:
    lengths = lengths_of(60)
    rows = [{"sample_id": n, "input_ids": [3] * length, "target_start": 4} for n, length in enumerate(lengths.tolist())]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "train.parquet")
    table, pilot = TrainTable(tmp_path / "train.parquet"), {"batch_size": 8, "micro_batch_size": 4, "epochs": 2}
    for grouped, given in ((True, lengths), (False, None)):
        config = RunConfig.model_validate({"pilot": pilot, "data": {"group_by_length": grouped}, "run": {"seed": 5}})
        found, wanted = table.order(config), RoundOrder(60, 8, 2, 5, lengths=given)
        assert found.rounds == wanted.rounds == 15
        assert all(np.array_equal(found.sample_rows(number), wanted.sample_rows(number)) for number in range(1, 16))


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
