"""Several sequences in one row: each is computed, learned from and logged as if it had a row by itself, in every family."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.conversations import EARLIER
from tc_ray.data.prepared.batches import collate, targets_of
from tc_ray.data.prepared.packing import packed, shared_rows
from tc_ray.mistakelog.rows.records import Records
from tc_ray.models.pilot.load import check_packing, load_pilot
from tc_ray.models.pilot.step import PilotStep, StepRecord
from tc_ray.pilot import engine
from tc_ray.pilot.engine import step_inputs
from tc_ray.pilot.loop import PilotJob, Worker
from tc_ray.pilot.record import to_records
from tests.support.family_samples import folder_of, new_pilot, quiet
from tests.support.reference import dense_record
from tests.support.reference_samples import close, dense_errors, states_of
from tests.support.tiny_families import DECODER_ONLY, VOCAB
from tests.support.tiny_run import tiny_config
from tests.unit.pilot.test_validation import Points, write_rows

quiet()

CPU = torch.device("cpu")
TARGETS = [[(4, 7), (11, 12), (15, 21)], [(3, 9)], [(1, 2)], [(2, 5), (9, 17)], [(5, 8)], [(1, 3)], [(6, 14)]]
"""Targets of each sequence; the last one ends it. Longer and shorter than the families' windows of 4 and 5."""
ROW = 24


def sequences() -> list[dict[str, Any]]:
    rng, sample, made = np.random.default_rng(5), 40, []
    for spans in TARGETS:
        ids = rng.integers(2, VOCAB, spans[-1][1]).tolist()
        earlier = [place for span in spans[:-1] for place in span] or None
        made.append({"input_ids": ids, "target_start": spans[-1][0], "sample_id": sample, EARLIER: earlier})
        sample += len(spans)
    return made


def batch() -> dict[str, np.ndarray]:
    return collate(sequences(), 0)


def run(step: PilotStep, row_tokens: int | None) -> tuple[torch.Tensor, StepRecord]:
    loss, record = step(loss_scale=0.5, **step_inputs(batch(), CPU, row_tokens=row_tokens))
    assert record is not None
    return loss, record


def records_of(step: PilotStep, row_tokens: int | None, **log: Any) -> Records:
    seen = np.arange(len(TARGETS), dtype=np.int16)
    section = LogSection.model_validate(log)
    records, _ = to_records(run(step, row_tokens)[1], batch(), seen, section, round=7, rank=1, attempt=2)
    records.validate()
    return records


def test_every_token_stands_once_in_its_sequence_s_row() -> None:
    rows, made = sequences(), packed(batch(), ROW)
    assert made.ids.shape == made.positions.shape == (4, 21) and made.ids.size < batch()["input_ids"].size
    flat, positions, taken = made.ids.ravel(), made.positions.ravel(), np.zeros(made.ids.size, bool)
    for number, row in enumerate(rows):
        places = made.places[number, : len(row["input_ids"])]
        assert flat[places].tolist() == row["input_ids"] and positions[places].tolist() == list(range(len(places)))
        assert places.tolist() == list(range(places[0], places[0] + len(places))), "in one piece"
        assert places[0] // made.ids.shape[1] == places[-1] // made.ids.shape[1], "in one row"
        assert not taken[places].any()
        taken[places] = True
    assert not flat[~taken].any() and not positions[~taken].any()


def test_rows_are_as_few_cells_as_a_search_finds() -> None:
    """Against every way to share rows; packing by the longest first is not always the best, but never worse than none."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        lengths, most = rng.integers(1, 30, 5).tolist(), 40
        row, width = shared_rows(lengths, most)
        fills = np.bincount(row, lengths)
        assert width == fills.max() <= most and fills.min() > 0
        least = min(
            len(filled) * max(filled)
            for way in product(range(5), repeat=5)
            if max(filled := [f for f in np.bincount(way, lengths).tolist() if f]) <= most
        )
        assert least <= len(fills) * width <= min(1.25 * least, 5 * max(lengths))
    # one sequence alone, and one that is longer than a row may be
    assert [made.tolist() if isinstance(made, np.ndarray) else made for made in shared_rows([7], 40)] == [[0], 7]
    row, width = shared_rows([50, 10, 20, 15], 40)
    assert width == 50 and len(set(row.tolist())) == 2


@pytest.mark.parametrize(("family", "attention"), [*((name, None) for name in DECODER_ONLY), ("gemma3", "eager")])
def test_loss_record_and_gradients_are_those_of_rows_of_their_own(family: str, attention: str | None) -> None:
    """Sliding windows, local and global rotations, soft caps: whatever a family has, no sequence sees another."""
    found = []
    for row_tokens in (None, ROW):
        model = load_pilot(folder_of(family), dtype=torch.float32, attention=attention)
        step = PilotStep(model, top_k=VOCAB - 1, question=True).train()
        loss, record = run(step, row_tokens)
        loss.backward()
        found.append((loss.detach(), record, {name: p.grad for name, p in model.named_parameters()}))
    (loss, record, gradients), (other_loss, other, others) = found
    close(other_loss, loss)
    close(other.token_loss, record.token_loss)
    close(dense_errors(other.errors.ids, other.errors.values, VOCAB), dense_errors(*record.errors[:2], VOCAB))
    real = torch.from_numpy(batch()["attention_mask"]).bool()
    close(other.rationale[real], record.rationale[real])
    assert torch.equal(other.question, record.question)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5)


def test_without_positions_of_its_own_a_sequence_sees_those_before_it() -> None:
    """The control: what the tests above would find."""
    step = PilotStep(new_pilot("llama").eval(), top_k=5)
    inputs = step_inputs(batch(), CPU, row_tokens=ROW)
    through = torch.arange(inputs["packed"].ids.shape[1]).expand_as(inputs["packed"].ids)
    right, wrong = (
        step.measure(**inputs | {"packed": inputs["packed"]._replace(positions=positions)}).token_loss.detach()
        for positions in (inputs["packed"].positions, through)
    )
    assert float((right - wrong).abs().max()) > 0.1


@pytest.mark.parametrize(
    "log",
    [{"positions": "all"}, {"positions": "target"}, {"rationale": "all"}, {"rationale": [1, 3], "error": "dense"}],
    ids=["positions", "targets", "layers", "some layers, dense"],
)
def test_each_target_leaves_the_record_that_it_leaves_unpacked(log: dict[str, Any]) -> None:
    layers = kept if isinstance(kept := log.get("rationale"), list) else None
    pooling = "none" if "rationale" in log else "mean"
    step = PilotStep(
        new_pilot("gemma3").eval(), top_k=6, pooling=pooling, layers=layers, dense=log.get("error") == "dense"
    )
    apart, together = records_of(step, None, **log), records_of(step, ROW, **log)
    assert together.sample_id.tolist() == targets_of(batch()).sample_id.tolist()
    for name in Records.__dataclass_fields__:
        one, other = getattr(apart, name), getattr(together, name)
        if name == "rationale":  # bf16 as bits
            one, other = ((a.astype(np.uint32) << 16).view(np.float32) for a in (one, other))
            np.testing.assert_allclose(other, one, rtol=2**-7, atol=1e-4)
        elif name in ("error_values", "error_rest", "token_loss"):
            np.testing.assert_allclose(other, one, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(other, one, err_msg=name)


def test_states_of_a_packed_record_are_the_slow_reference_s() -> None:
    pilot = new_pilot("llama").eval()
    records = records_of(PilotStep(pilot, top_k=6), ROW)
    spans = [(row, start, end) for row, spans in enumerate(TARGETS) for start, end in spans]
    for number, (row, start, end) in enumerate(spans):
        expected = dense_record(pilot, sequences()[row]["input_ids"][:end], start)
        torch.testing.assert_close(states_of(records, number), expected.states[:-1], rtol=1e-2, atol=1e-2)


def test_the_worker_trains_alike_in_packed_rows(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real engine and loop: the losses of four rounds, the validations between them included, are those of rows of their own."""
    rows = [(f"{n}" * (1 + n % 7) + "=", str(n + 1)) for n in range(16)]
    file, _ = (write_rows(tmp_path / f"{name}.parquet", rows) for name in ("train", "validation"))
    losses, computed = [], []
    made = engine.packed
    monkeypatch.setattr(engine, "packed", lambda *given: computed.append(made(*given)) or computed[-1])
    for packing in (False, True):
        points = Points()
        sizes = {
            "pilot__batch_size": 8,
            "pilot__micro_batch_size": 4,
            "pilot__packing": packing,
            "run__name": f"p{packing}",
        }
        config = tiny_config(
            tmp_path, log__enabled=False, run__folder=tmp_path / str(packing), pilot__validate_every=2, **sizes
        )
        Worker(PilotJob(config, config.model.pilot, file, 4, None, points), 0, 1).run()
        losses.append([*points.losses.values(), *(found["nll"] for found in points.found.values())])
        assert len(computed) == (8 if packing else 0)
    assert any(len(one.ids) < len(one.places) for one in computed)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 6
    assert losses[0][3] < losses[0][0]


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"attn_implementation flash_attention_2 must be sdpa or eager"):
        RunConfig.model_validate(
            {
                "pilot": {"packing": True},
                "model": {"attn_implementation": "flash_attention_2"},
            }
        )
    config = RunConfig.model_validate({"pilot": {"packing": True}, "model": {"pilot": "my-t5"}})
    with pytest.raises(ValueError, match=r"pilot\.packing .* my-t5 is an encoder-decoder.*group_by_length"):
        check_packing(config, new_pilot("t5").config)
    check_packing(config, new_pilot("llama").config)
    assert config.row_tokens == config.data.cutoff_tokens and RunConfig().row_tokens is None
