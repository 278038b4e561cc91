"""Several targets in one row: loss, records and batches against the slow reference, and against each target in a row by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tc_ray.config.log import LogSection
from tc_ray.copilot.batch import batch_from_records
from tc_ray.data.encode.conversations import EARLIER
from tc_ray.data.prepared.batches import TrainTable, collate, targets_of
from tc_ray.data.prepared.folder import SCHEMA
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.sampling import has_mistake, in_fraction
from tc_ray.models.copilot import CopilotBatch
from tc_ray.models.pilot.step import PilotStep, StepRecord
from tc_ray.pilot.engine import step_inputs
from tc_ray.pilot.record import chosen_records, to_records
from tests.support.family_samples import new_pilot, quiet
from tests.support.mistakelog_samples import assert_same
from tests.support.reference import dense_record
from tests.support.reference_samples import dense_errors, states_of
from tests.support.tiny_families import VOCAB

quiet()

SPANS = [[(4, 7), (11, 12), (15, 21)], [(3, 9)], [(2, 5), (9, 17)]]
"""Targets of each row; the last one ends it."""
CPU = torch.device("cpu")


def rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    made, sample = [], 40
    for spans in SPANS:
        ids = rng.integers(2, VOCAB, spans[-1][1]).tolist()
        earlier = [place for span in spans[:-1] for place in span] or None
        made.append({"input_ids": ids, "target_start": spans[-1][0], "sample_id": sample, EARLIER: earlier})
        sample += len(spans)
    return made


def alone() -> list[dict[str, Any]]:
    """Each target in a row that ends with it."""
    return [
        {"input_ids": row["input_ids"][:end], "target_start": start, "sample_id": row["sample_id"] + number}
        for row, spans in zip(rows(), SPANS, strict=True)
        for number, (start, end) in enumerate(spans)
    ]


def forward(step: PilotStep, given: list[dict[str, Any]]) -> tuple[torch.Tensor, StepRecord]:
    loss, record = step(loss_scale=1.0, **step_inputs(collate(given, 0), CPU))
    assert record is not None
    return loss, record


def records_of(step: PilotStep, given: list[dict[str, Any]], positions: str, **more: Any) -> Records:
    log, seen = LogSection.model_validate({"positions": positions}), np.arange(len(given), dtype=np.int16)
    records, _ = to_records(forward(step, given)[1], collate(given, 0), seen, log, round=7, rank=1, attempt=2, **more)
    records.validate()
    return records


@pytest.mark.parametrize("positions", ["all", "target"])
def test_loss_and_records_of_several_targets_are_the_reference_s(positions: str) -> None:
    """Errors are truth - softmax at the positions of the targets and nowhere else, in order; a record ends with its target."""
    pilot = new_pilot("llama").eval()
    step = PilotStep(pilot, top_k=VOCAB - 1).eval()
    loss, record = forward(step, rows())
    expected = [dense_record(pilot, row["input_ids"], row["target_start"]) for row in alone()]
    torch.testing.assert_close(loss.detach(), torch.cat([e.token_loss for e in expected]).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(record.token_loss, torch.cat([e.token_loss for e in expected]), rtol=1e-5, atol=1e-5)
    found = dense_errors(record.errors.ids, record.errors.values, VOCAB)
    torch.testing.assert_close(found, torch.cat([e.errors for e in expected]), rtol=1e-5, atol=1e-6)
    records = records_of(step, rows(), positions)
    assert records.sample_id.tolist() == list(range(40, 46)) and records.seen.tolist() == [0, 0, 0, 1, 2, 2]
    for number, (row, reference) in enumerate(zip(alone(), expected, strict=True)):
        ids = records.input_ids[records.seq_offsets[number] : records.seq_offsets[number + 1]]
        assert ids.tolist() == row["input_ids"] and records.target_start[number] == row["target_start"]
        first = 0 if positions == "all" else row["target_start"] - 1
        torch.testing.assert_close(states_of(records, number), reference.states[first:-1], rtol=1e-2, atol=1e-2)
    # without the earlier targets it is another loss: the check above is no accident
    bare = [{**row, EARLIER: None} for row in rows()]
    assert float(forward(step, bare)[0].detach()) < 0.8 * float(loss.detach())


@pytest.mark.parametrize("positions", ["all", "target"])
@pytest.mark.parametrize("question", [False, True])
def test_records_are_those_of_each_target_in_a_row_by_itself(positions: str, question: bool) -> None:
    """So the Copilot learns from what it gets at inference: all messages before the answer as X~, and rows of one answer."""
    step = PilotStep(new_pilot("llama").eval(), top_k=6, question=question).eval()
    together, apart = records_of(step, rows(), positions), records_of(step, alone(), positions)
    for name in ("sample_id", "input_ids", "seq_offsets", "target_start", "rationale_offsets", "target_offsets"):
        np.testing.assert_array_equal(getattr(together, name), getattr(apart, name), err_msg=name)
    for name in ("error_values", "error_rest", "token_loss"):
        np.testing.assert_allclose(getattr(together, name), getattr(apart, name), atol=1e-5, err_msg=name)
    assert (together.question is None) == (not question)
    one, other = batch_from_records(together), batch_from_records(apart)
    for name in ("question_ids", "question_mask", "rationale_position", "row_position"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.rationale, other.rationale, rtol=1e-2, atol=1e-2)
    _, record = forward(step, alone())
    given = step_inputs(collate(alone(), 0), CPU)
    direct = CopilotBatch.from_step(record, *given.values(), positions=positions)
    assert torch.equal(direct.row_position, one.row_position)


def test_gradients_of_a_shared_row_are_the_sum_of_those_apart() -> None:
    gradients = []
    for given in (rows(), alone()):
        pilot = new_pilot("llama").eval()
        forward(PilotStep(pilot, top_k=4).eval(), given)[0].backward()
        gradients.append([p.grad.clone() for p in pilot.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_sampling_chooses_among_targets() -> None:
    step = PilotStep(new_pilot("llama").eval(), top_k=6).eval()
    whole, record, batch = records_of(step, rows(), "all"), forward(step, rows())[1], collate(rows(), 0)
    assert_same(records_of(step, rows(), "all", chosen=np.array([1, 3, 5])), whole.select([1, 3, 5]))
    log = LogSection(sampling="fraction", sampling_fraction=0.5)
    some = chosen_records(record, batch, log, seed=17, round=7)
    assert some is not None
    assert some.tolist() == np.flatnonzero(in_fraction(0.5, 17, whole.round, whole.sample_id)).tolist()
    mistakes = chosen_records(record, batch, LogSection(sampling="mistakes", mistake_loss=5.0), seed=17, round=7)
    expected = has_mistake(whole.token_correct, whole.token_loss, whole.target_offsets, 5.0)
    assert mistakes is not None and mistakes.tolist() == np.flatnonzero(expected).tolist()


def test_the_table_counts_every_target(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(), schema=SCHEMA), tmp_path / "train.parquet")
    table = TrainTable(tmp_path / "train.parquet")
    assert table.target_tokens(np.arange(3)) == sum(end - start for spans in SPANS for start, end in spans)
    assert table.target_tokens(np.array([1])) == 6 and table.tokens(np.arange(3)) == 21 + 9 + 17
    learned = {token for row in alone() for token in row["input_ids"][row["target_start"] :]}
    assert table.target_ids().tolist() == sorted(learned)
    batch, expected = table.batch(np.array([2, 0])), collate([rows()[2], rows()[0]], 0)
    assert batch.keys() == expected.keys()
    assert all(np.array_equal(batch[name], expected[name]) for name in batch)
    assert targets_of(batch).sample_id.tolist() == [44, 45, 40, 41, 42]
    assert EARLIER not in table.batch(np.array([1]))
