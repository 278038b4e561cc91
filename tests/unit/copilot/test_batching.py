"""A Copilot batch against the records it was made of, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tc_ray.copilot.batching import batch_from_records
from tests.support.mistakelog_samples import DIM, TOP_K, random_records


@pytest.mark.parametrize("question", [False, True])
@pytest.mark.parametrize("rows", [None, [4], [6, 0, 6, 3], range(2, 7)])
def test_every_cell(rows: list[int] | None, question: bool) -> None:
    records = random_records(8, seed=5, question=question)
    batch = batch_from_records(records, rows)
    chosen = list(range(8)) if rows is None else list(rows)
    singles = [records.select([row]) for row in chosen]
    longest = {
        "question": max(int(one.target_start[0]) for one in singles),
        "states": max(len(one.rationale) for one in singles),
        "targets": max(len(one.error_rest) for one in singles),
    }
    assert batch.question_ids.shape == batch.question_mask.shape == (len(chosen), longest["question"])
    assert batch.rationale.shape == (len(chosen), longest["states"], DIM) and batch.rationale.dtype == torch.bfloat16
    assert batch.error_ids.shape == batch.error_values.shape == (len(chosen), longest["targets"], TOP_K + 1)
    assert (batch.error_ids.dtype, batch.error_values.dtype) == (torch.int64, torch.float32)
    assert (batch.question is not None) == question
    for b, one in enumerate(singles):
        start, length = int(one.target_start[0]), len(one.input_ids)
        states = len(one.rationale)

        def padded(array: np.ndarray, to: int, fill: int = 0) -> list:
            filled = np.full((to, *array.shape[1:]), fill, array.dtype)
            filled[: len(array)] = array
            return filled.tolist()

        def bits(tensor: torch.Tensor) -> list:
            return tensor.view(torch.int16).numpy().view(np.uint16).tolist()

        assert batch.question_ids[b].tolist() == padded(one.input_ids[:start], longest["question"])
        assert batch.question_mask[b].tolist() == [place < start for place in range(longest["question"])]
        assert bits(batch.rationale[b]) == padded(one.rationale[:, 0], longest["states"])
        position = np.arange(length - 1 - states, length - 1)
        assert batch.rationale_position[b].tolist() == padded(position, longest["states"], -1)
        assert batch.row_position[b].tolist() == padded(np.arange(start - 1, length - 1), longest["targets"], -1)
        assert batch.error_ids[b].tolist() == padded(one.error_ids, longest["targets"])
        assert batch.error_values[b].tolist() == padded(one.error_values, longest["targets"])
        if question:
            assert batch.question is not None and one.question is not None
            assert bits(batch.question[b]) == padded(one.question, longest["question"])


def test_padding_is_zero_in_memory_used_before() -> None:
    """Only the padding is cleared: also where the allocator hands out memory that held other values."""
    records = random_records(64, seed=1)
    for _ in range(20):
        dirty = [np.full(size, 255, np.uint8) for size in (512, 4096, 16384, 65536)]
        del dirty
        batch = batch_from_records(records)
        padding = ~batch.row_mask
        assert padding.any() and not batch.error_ids[padding].any() and not batch.error_values[padding].any()
        assert not batch.rationale.view(torch.int16)[batch.rationale_position < 0].any()
        assert not batch.question_ids[~batch.question_mask].any()
