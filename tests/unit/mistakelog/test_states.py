"""Hidden states in 8 bits (`log.states: int8`): the error's bound, what a reader gets, what takes half the room."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.finite import finite_rows
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.rows.states import dequantised, quantised
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import DIM, assert_same, finite_bits, merge_all, metadata, random_records

NAN, INFINITY = 0x7FC0, 0xFF80


def numbers_of(bits: np.ndarray) -> np.ndarray:
    """float64 numbers of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def states(width: int, count: int = 300) -> np.ndarray:
    """States of every size: hidden ones, random bits, the largest, the smallest, zeros, one number among zeros."""
    rng = np.random.default_rng(width)
    usual = ((rng.standard_normal((count, width)) * 3).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    random = finite_bits(rng, (count, width))
    largest, smallest = np.full((2, width), 0x7F7F, np.uint16), np.full((2, width), 0x8001, np.uint16)
    zeros = np.zeros((2, width), np.uint16)
    lonely = zeros.copy()
    lonely[:, -1] = 0x4248
    return np.concatenate([usual, random, largest, smallest, zeros, lonely])


@pytest.mark.parametrize("width", [1, 7, 576, 70_000])
def test_a_number_is_within_half_a_scale(width: int) -> None:
    bits = states(width, count=300 if width < 70_000 else 2)
    numbers, scales = quantised(bits)
    exact, scale = numbers_of(bits), scales.astype(np.float64)[:, None]
    # fp32 divides and multiplies with an error of its own, of the scale's smallest bit where the scale has lost some
    slack = 1e-4 * scale + 64 * 2.0**-149
    assert (np.abs(numbers * scale - exact) <= scale / 2 + slack).all()
    np.testing.assert_allclose(scale[:, 0], np.abs(exact).max(1) / 127, rtol=1e-6, atol=2.0**-149)
    back = numbers_of(dequantised(numbers, scales))
    rounding = np.abs(numbers * scale) * 2.0**-8 + 2.0**-133
    assert (np.abs(back - exact) <= scale / 2 + slack + rounding).all()


def test_bits_are_rounded_as_by_torch() -> None:
    import torch

    numbers, scales = quantised(states(576))
    wide = torch.from_numpy(numbers).float() * torch.from_numpy(scales)[:, None]
    expected = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(dequantised(numbers, scales), expected)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("question", [False, True])
def test_a_table_holds_numbers_and_scales(layers: int, question: bool) -> None:
    records = dataclasses.replace(random_records(17, layers=layers, question=question), rationale_dtype="int8")
    table = records.to_arrow("r")
    found = Records.from_arrow(table)
    numbers, scales = quantised(records.rationale.reshape(-1, DIM))
    expected = dequantised(numbers, scales).reshape(records.rationale.shape)
    assert_same(found, dataclasses.replace(records, rationale=expected))
    # without tc-ray, as docs/mistake-log.md says
    row, one = table.to_pylist()[3], found.select([3])
    cell = np.frombuffer(row["rationale"], np.int8).reshape(-1, layers, DIM)
    outside = cell * np.reshape(row["rationale_scale"], (-1, layers, 1))
    np.testing.assert_allclose(outside, numbers_of(one.rationale), rtol=2.0**-8)


def test_bf16_has_no_scales_and_cells_must_fit() -> None:
    assert random_records(3).to_arrow("r").column("rationale_scale").null_count == 3
    table = dataclasses.replace(random_records(5, layers=2), rationale_dtype="int8").to_arrow("r")
    at = table.schema.get_field_index("rationale_scale")
    short = pa.array([cell[:-1] for cell in table.column(at).to_pylist()], pa.list_(pa.float32()))
    with pytest.raises(LogSchemaError, match="not one scale for each state"):
        Records.from_arrow(table.set_column(at, table.schema.field(at), short))
    with pytest.raises(LogSchemaError, match="null cells"):
        Records.from_arrow(
            random_records(5).to_arrow("r"), metadata(rationale_dtype="int8", rationale_dim=2 * DIM).to_configuration()
        )


@pytest.mark.parametrize("bits", [NAN, INFINITY])
def test_a_state_that_is_not_finite_stays_so(bits: int) -> None:
    records = dataclasses.replace(random_records(20), rationale_dtype="int8")
    place = len(records.rationale) // 2
    records.rationale[place, 0, 1] = bits
    row = int(np.searchsorted(records.rationale_offsets, place, side="right")) - 1
    found = Records.from_arrow(records.to_arrow("r"))
    assert finite_rows(found).tolist() == [index for index in range(20) if index != row]


def write(folder: Path, kind: str, rounds: list[Records]) -> int:
    """Bytes of a log with these rounds."""
    described = metadata(rationale_dtype=kind, rationale_dim=rounds[0].rationale_dim)
    ledger = Ledger(LogStore.create(folder, described).location, writers=1, run="test")
    settings = LogSection(flush_rounds=2)
    writer = RecordWriter(folder, ledger.commit, settings, run="test", rank=0, attempt=ledger.begin_attempt(0, 1))
    for number, records in enumerate(rounds, 1):
        writer.put(dataclasses.replace(records, rationale_dtype=kind), number)
        writer.end_round(number)
    writer.close()
    return ledger.state().bytes


def test_a_log_takes_half_the_room_and_survives_merging(tmp_path: Path) -> None:
    width, rounds = 256, []
    for number in range(1, 7):
        small = random_records(12, round=number, first_sample=100 * number)
        values = np.random.default_rng(number).standard_normal((len(small.rationale), 1, width)).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        rounds.append(dataclasses.replace(small, rationale=bits, rationale_dim=width))
    wide, narrow = write(tmp_path / "bf16", "bf16", rounds), write(tmp_path / "int8", "int8", rounds)
    positions = sum(len(records.rationale) for records in rounds)
    assert narrow == pytest.approx(wide - positions * (width - 4), rel=0.02)
    with MistakeLog(tmp_path / "int8") as log:
        before = log.records()
        assert log.metadata.rationale_dtype == "int8"
    merge_all(tmp_path / "int8")
    with MistakeLog(tmp_path / "int8") as log:
        assert len(log.files) == 1
        assert_same(log.records(), before)
    exact, found = numbers_of(Records.concat(rounds).rationale), numbers_of(before.rationale)
    largest = np.abs(exact).max(-1, keepdims=True)
    assert (np.abs(found - exact) <= largest * (1 / 254 + 2.0**-8)).all()
