"""From a forward pass to records: dense errors, sampling, and no copy on the host that is not needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.rows.ragged import listed_errors, vocabulary_order
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.sampling import has_mistake, in_fraction
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.models.pilot.step import PilotStep, StepRecord, full_errors, sparse_errors
from tc_ray.pilot.record import HostCopy, chosen_records, to_records
from tests.support.family_samples import new_pilot, quiet
from tests.support.mistakelog_samples import assert_same, random_records
from tests.support.reference_samples import dense_errors
from tests.support.tiny_families import VOCAB

quiet()

SHAPES = [(9, 8), (13, 1), (19, 6), (5, 3), (12, 2)]


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    ids = np.zeros((len(SHAPES), max(length for length, _ in SHAPES)), np.int64)
    for row, (length, _) in enumerate(SHAPES):
        ids[row, :length] = rng.integers(2, VOCAB, length)
    lengths, starts = (np.array(column) for column in zip(*SHAPES, strict=True))
    return {"input_ids": ids, "lengths": lengths, "target_start": starts, "sample_id": 40 + np.arange(len(SHAPES))}


def forward(family: str, *, dense: bool = False, pooling: str = "mean", device: str = "cpu") -> StepRecord:
    given = batch()
    step = PilotStep(new_pilot(family).to(device), top_k=6, dense=dense, pooling=pooling).eval()
    tensors = [torch.from_numpy(given[name]).to(device) for name in ("input_ids", "lengths", "target_start")]
    record = step.measure(*tensors).record
    assert record is not None
    return record


def records_of(step: StepRecord, positions: str = "target", error: str = "top-k", **given: Any) -> Records:
    log = LogSection.model_validate({"positions": positions, "error": error})
    seen = np.arange(len(SHAPES), dtype=np.int16)
    records, wait = to_records(step, batch(), seen, log, round=7, rank=1, attempt=2, **given)
    assert wait is None
    return records


# -- dense errors -------------------------------------------------------------------------------------------------


def test_full_errors_are_those_of_every_token() -> None:
    torch.manual_seed(1)
    log_probs, targets = (5 * torch.randn(9, 31)).log_softmax(-1), torch.arange(9) * 3
    full, sparse = full_errors(log_probs, targets), sparse_errors(log_probs, targets, 30)
    torch.testing.assert_close(dense_errors(*full[:2], 31), dense_errors(*sparse[:2], 31), rtol=0, atol=0)
    assert torch.equal(full.ids[:, 0], targets) and torch.equal(full.values[:, 0], sparse.values[:, 0])
    for row in full.ids[:, 1:].tolist():
        assert row == sorted(set(row)) and len(row) == 30
    assert not full.rest.any()


@pytest.mark.parametrize("family", ["llama", "flan_t5"])
def test_dense_errors_through_the_table(family: str) -> None:
    """Rows hold V values in vocabulary order and no ids; in memory the records are those of `top_k` V - 1 but for the order."""
    made = records_of(forward(family, dense=True), error="dense")
    assert made.top_k == VOCAB - 1
    table = made.to_arrow("r")
    ids = batch()["input_ids"]
    for row, (length, start) in enumerate(SHAPES):
        cell = np.array(table["error_values"][row].as_py(), np.float32).reshape(length - start, VOCAB)
        assert table["error_ids"][row].as_py() == []
        np.testing.assert_allclose(cell.sum(1), 0.0, atol=1e-6)
        for token, errors in zip(ids[row, start:length], cell, strict=True):
            assert errors[token] >= 0 and (np.delete(errors, token) <= 0).all()
    assert_same(Records.from_arrow(table), made)
    some = made.select([3, 0])
    assert_same(Records.from_arrow(Records.concat([some, made]).to_arrow("r")), Records.concat([some, made]))
    # the same forward with everything listed
    step = forward(family)
    listed = sparse_like(made)
    np.testing.assert_array_equal(made.token_loss, step.token_loss.numpy())
    np.testing.assert_array_equal(made.token_correct, step.token_correct.numpy())
    np.testing.assert_allclose(listed[:, :7], step.errors.values.numpy(), rtol=0, atol=0)


def sparse_like(dense: Records) -> np.ndarray:
    """Its values with the others by size, as sparse errors have them."""
    return np.concatenate([dense.error_values[:, :1], np.sort(dense.error_values[:, 1:], axis=1)], 1)


def test_dense_order_there_and_back() -> None:
    rng = np.random.default_rng(0)
    values, true = rng.random((6, 9)).astype(np.float32), rng.integers(0, 9, 6)
    ids, listed = listed_errors(values, true)
    assert ids[:, 0].tolist() == true.tolist()
    np.testing.assert_array_equal(vocabulary_order(ids, listed), values)


def test_dense_rows_that_do_not_fit_are_refused() -> None:
    made = records_of(forward("llama", dense=True), error="dense")
    table = made.to_arrow("r")
    metadata = made.arrow_metadata()
    with pytest.raises(LogSchemaError, match="list lengths do not fit"):
        Records.from_arrow(table, metadata | {"tc_ray.top_k": str(VOCAB)})
    with pytest.raises(LogSchemaError, match="list lengths do not fit"):  # a log that promises ids
        Records.from_arrow(table, metadata | {"tc_ray.error": "top-k"})
    swapped = dataclasses.replace(made, error_ids=made.error_ids[:, ::-1])
    with pytest.raises(ValueError, match="the true token first"):
        swapped.validate()


# -- sampling -----------------------------------------------------------------------------------------------------


def test_a_fraction_follows_from_seed_round_and_sample_alone() -> None:
    samples, rounds = np.tile(np.arange(2000), 10), np.repeat(np.arange(1, 11), 2000)
    chosen = in_fraction(0.3, 17, rounds, samples)
    # standard deviation 0.0032 over all, 0.010 a round; neighbours must not be chosen together
    assert abs(chosen.mean() - 0.3) < 0.013
    assert all(abs(part.mean() - 0.3) < 0.05 for part in np.split(chosen, 10))
    assert abs((chosen[1:] & chosen[:-1]).mean() - 0.09) < 0.013
    assert abs((chosen[:2000] & chosen[2000:4000]).mean() - 0.09) < 0.03
    order = np.random.default_rng(0).permutation(len(samples))
    np.testing.assert_array_equal(in_fraction(0.3, 17, rounds[order], samples[order]), chosen[order])
    assert (in_fraction(0.3, 18, rounds, samples) != chosen).any()
    assert not (chosen & ~in_fraction(0.5, 17, rounds, samples)).any()
    assert in_fraction(1.0, -3, rounds, samples).all()
    # SplitMix64 for good: a log goes on after an update of tc-ray
    expected = [splitmix(splitmix(splitmix(17) ^ 5) ^ sample) / 2**64 < 0.3 for sample in range(200)]
    np.testing.assert_array_equal(in_fraction(0.3, 17, np.full(200, 5), np.arange(200)), expected)


def splitmix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@pytest.mark.parametrize("bound", [None, 0.7])
def test_mistakes(bound: float | None) -> None:
    records = random_records(60, seed=4)
    found = has_mistake(records.token_correct, records.token_loss, records.target_offsets, bound)
    for row in range(60):
        span = slice(records.target_offsets[row], records.target_offsets[row + 1])
        wrong = not records.token_correct[span].all()
        dear = bound is not None and bool((records.token_loss[span] > bound).any())
        assert found[row] == (wrong or dear)
    assert 0 < found.sum() < 60


@pytest.mark.parametrize(("family", "positions"), [("llama", "all"), ("llama", "target"), ("t5", "target")])
@pytest.mark.parametrize("rows", [[1, 4], [0], [], [0, 1, 2, 3, 4]])
def test_rows_left_out_are_as_if_selected_afterwards(family: str, positions: str, rows: list[int]) -> None:
    step = forward(family, pooling="none")
    whole, part = records_of(step, positions), records_of(step, positions, chosen=np.array(rows, np.int64))
    part.validate()
    assert_same(part, whole.select(rows))


def test_chosen_records_are_those_of_the_policies() -> None:
    step, given = forward("llama"), batch()
    whole = records_of(step)
    options: dict[str, Any] = {"seed": 17, "round": 7}
    assert chosen_records(step, given, LogSection(), **options) is None
    some = chosen_records(step, given, LogSection(sampling="fraction", sampling_fraction=0.5), **options)
    assert some is not None
    assert some.tolist() == np.flatnonzero(in_fraction(0.5, 17, whole.round, whole.sample_id)).tolist()
    for bound in (None, 1.0):
        log = LogSection(sampling="mistakes", mistake_loss=bound)
        expected = has_mistake(whole.token_correct, whole.token_loss, whole.target_offsets, bound)
        some = chosen_records(step, given, log, **options)
        assert some is not None and some.tolist() == np.flatnonzero(expected).tolist()


# -- copies -------------------------------------------------------------------------------------------------------


def test_arrow_holds_the_memory_of_the_records() -> None:
    """No host copy between the conversion and Parquet, but for the bools, which Arrow packs."""
    made = records_of(forward("t5"))
    batch = made.to_arrow("r").to_batches()[0]
    for name in ("rationale", "question", "input_ids", "error_ids", "error_values", "error_rest", "token_loss"):
        array, column = getattr(made, name), batch.column(name)
        values = column.buffers()[2] if name in ("rationale", "question") else column.values.buffers()[1]
        assert values.address == array.ctypes.data, name


def test_errors_are_the_step_s_own_memory_on_the_cpu() -> None:
    step = forward("llama")
    made = records_of(step)
    for name, tensor in (
        ("error_values", step.errors.values),
        ("error_rest", step.errors.rest),
        ("token_loss", step.token_loss),
        ("token_correct", step.token_correct),
    ):
        assert np.shares_memory(getattr(made, name), tensor.numpy()), name


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, np.array([1, 3])])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_copy_from_a_device_is_what_the_device_had(family: str, rows: np.ndarray | None) -> None:
    """On a side stream, while the device is kept busy; what is written over afterwards must not show."""
    step = forward(family, pooling="none", device="cuda")
    expected = records_of(StepRecord(*(_on_cpu(part) for part in step)), chosen=rows)
    copy = HostCopy(torch.device("cuda"))
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 64
    log = LogSection(positions="target")
    seen = np.arange(len(SHAPES), dtype=np.int16)
    records, wait = to_records(step, batch(), seen, log, round=7, rank=1, attempt=2, chosen=rows, copy=copy)
    assert wait is not None and len(records) == len(expected)
    del step
    for _ in range(20):  # takes the memory of the step again
        torch.full((64, 19, 3, 32), 7.0, device="cuda")
    wait()
    assert_same(records, expected)


def _on_cpu(part: Any) -> Any:
    if isinstance(part, tuple):
        return type(part)(*(x.cpu() for x in part))
    return None if part is None else part.cpu()
