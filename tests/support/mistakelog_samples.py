"""Random but valid records and metadata for the Mistake Log's tests."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from tc_ray.mistakelog.maintain.compaction import merge
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore

DIM = 4
TOP_K = 3


def metadata(**changes: Any) -> LogMetadata:
    """Metadata that fits `random_records` with its default layers."""
    base = LogMetadata(
        run="test",
        pilot="tiny",
        tokenizer_hash="abc",
        vocab_size=50,
        rationale_dim=DIM,
        rationale_layers=1,
        pooling="mean",
        tap="mean over decoder layers",
        positions="all",
        top_k=TOP_K,
    )
    return dataclasses.replace(base, **changes)


def finite_bits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random bf16 numbers, as bits: all but NaN and infinity, which the log does not take."""
    bits = rng.integers(0, 2**16, shape)
    return np.where(bits & 0x7F80 == 0x7F80, bits & 0xBFFF, bits).astype(np.uint16)


def random_records(
    rows: int,
    *,
    round: int = 1,
    rank: int = 0,
    attempt: int = 1,
    first_sample: int = 0,
    layers: int = 1,
    seed: int = 0,
    question: bool = False,
) -> Records:
    """`rows` records of one round with random lengths; some have no target token, some states only of targets."""
    rng = np.random.default_rng([seed, round, rank])
    lengths = rng.integers(2, 12, rows)
    starts = np.array([rng.integers(1, length + 1) for length in lengths], np.int32)
    targets = lengths - starts
    positions = np.where(rng.random(rows) < 0.5, lengths - 1, targets)
    total = int(targets.sum())

    def offsets(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)

    return Records(
        round=np.full(rows, round, np.int64),
        rank=np.full(rows, rank, np.int32),
        attempt=np.full(rows, attempt, np.int32),
        sample_id=np.arange(first_sample, first_sample + rows, dtype=np.int64),
        seen=rng.integers(0, 3, rows).astype(np.int16),
        input_ids=rng.integers(0, 50, lengths.sum()).astype(np.int32),
        seq_offsets=offsets(lengths),
        target_start=starts,
        rationale=finite_bits(rng, (int(positions.sum()), layers, DIM)),
        rationale_offsets=offsets(positions),
        rationale_layers=layers,
        rationale_dim=DIM,
        error_ids=rng.integers(0, 50, (total, TOP_K + 1)).astype(np.int32),
        error_values=rng.standard_normal((total, TOP_K + 1)).astype(np.float32),
        error_rest=rng.random(total).astype(np.float32),
        token_loss=rng.random(total).astype(np.float32),
        token_correct=rng.random(total) < 0.5,
        target_offsets=offsets(targets),
        question=finite_bits(rng, (int(starts.sum()), DIM)) if question else None,
    )


def in_order(records: Records) -> Records:
    """The same rows, sorted by round and sample."""
    return records.select(np.lexsort((records.sample_id, records.round)))


def assert_same(left: Records, right: Records) -> None:
    """Equal in every array, bit for bit."""
    for field in dataclasses.fields(Records):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), err_msg=field.name)


def merge_all(location: Path | Location) -> None:
    """All files of a log become one, as maintenance merges a few."""
    place = Location(location)
    with RunLease.take(place, "merge") as lease:
        store = LogStore(place, lease=lease.number)
        merge(store, store.files(), lambda: nullcontext({}))
