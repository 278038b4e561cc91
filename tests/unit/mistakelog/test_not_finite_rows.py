"""Fault 5: NaN and infinity in the Mistake Log's rows. The writer keeps them out, every reader passes over them and counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tc_ray.inspection.report import report_page
from tc_ray.inspection.samples import SampleNotFoundError, export_jsonl, visits_of
from tc_ray.inspection.stats import collect
from tc_ray.inspection.terminal import stats_view
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.finite import all_finite, finite_rows, only_finite
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.pilot import record
from tests.support.inspection_samples import make_examples, make_log
from tests.support.mistakelog_samples import random_records
from tests.unit.pilot.test_record import ROUNDS, Run

FIELDS = ("error_values", "error_rest", "token_loss", "rationale", "question")
TARGET_ARRAYS = ("error_ids", "error_values", "error_rest", "token_loss", "token_correct")
BITS = {np.nan: 0x7FC0, np.inf: 0x7F80, -np.inf: 0xFF80}
EXAMPLES = make_examples(samples=6, epochs=2, vocab=40)
SPOILT = {0: np.nan, 3: np.inf}
"""Target tokens of the second file whose first error is so."""


def spoil(records: Records) -> None:
    for token, value in SPOILT.items():
        records.error_values[token, 0] = value
        records.token_loss[token] = value


def spoilt_rows() -> int:
    second = [example for example in EXAMPLES if 4 <= example.round <= 6]
    owner = np.repeat(np.arange(len(second)), [len(example.answer) for example in second])
    return len({int(owner[token]) for token in SPOILT})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return make_log(tmp_path / "log", EXAMPLES, spoil=spoil)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", FIELDS)
def test_one_number_in_any_field_is_found(field: str, value: float) -> None:
    """Fault 5: in states, errors, rest, loss and question, whatever the sign."""
    records = random_records(20, question=True)
    assert all_finite(records) and only_finite(records) == (records, 0)
    array = getattr(records, field)
    offsets = {"rationale": records.rationale_offsets, "question": records.question_offsets}.get(
        field, records.target_offsets
    )
    place = len(array) // 2
    array[place] = BITS[value] if array.dtype == np.uint16 else value
    row = int(np.searchsorted(offsets, place, side="right")) - 1
    assert not all_finite(records)
    assert finite_rows(records).tolist() == [index for index in range(20) if index != row]
    kept, left_out = only_finite(records)
    assert left_out == 1 and all_finite(kept)


def test_rows_without_targets_are_looked_at_too() -> None:
    """Fault 5: arrays without a number in them, as rows without a target have, are no reason to fail."""
    records = random_records(3).select([0])
    without: dict[str, Any] = {name: getattr(records, name)[:0] for name in TARGET_ARRAYS}
    starts = np.diff(records.seq_offsets).astype(np.int32)
    records = replace(records, target_offsets=np.zeros(2, np.int64), target_start=starts, **without)
    assert finite_rows(records).tolist() == [0]
    records.rationale[0, 0, 0] = BITS[np.nan]
    assert len(only_finite(records)[0]) == 0


def test_the_writer_keeps_them_out_and_covers_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 5: rows with a NaN do not enter the log, a round of nothing else is covered without rows, and commits count them."""
    clean = Run(tmp_path / "clean")
    clean.attempt(0, ROUNDS)
    run = Run(tmp_path / "spoilt")
    made = record.to_records

    def spoil_some(*given: Any, round: int, **more: Any) -> tuple[Records, Any]:
        records, wait = made(*given, round=round, **more)
        if round == 1:
            records.token_loss[records.target_offsets[1] - 1] = np.nan
        if round == 3:
            records.rationale[:] = 0x7FC0
        return records, wait

    monkeypatch.setattr(record, "to_records", spoil_some)
    run.attempt(0, ROUNDS)
    per_round = len(clean.records()) // ROUNDS
    found = run.records()
    assert all_finite(found) and len(found) == len(clean.records()) - 2 - per_round
    assert 3 not in found.round
    store = LogStore(run.config.log_location)
    assert run.ledger.state().round == ROUNDS
    assert {r: n for rounds in dropped_records(store.commits()).values() for r, n in rounds.items()} == {
        1: 2,
        3: per_round,
    }


def test_no_row_of_a_round_without_a_step_enters_the_log(tmp_path: Path) -> None:
    """Fault 5: also the rows that hold no NaN, of a round whose loss was spoilt by others."""
    clean, run, spoilt = Run(tmp_path / "clean"), Run(tmp_path / "spoilt"), 4
    run.left_out = {spoilt}
    clean.attempt(0, ROUNDS)
    run.attempt(0, ROUNDS)
    found, all_rows = run.records(), clean.records()
    assert sorted(found.round.tolist()) == [number for number in sorted(all_rows.round.tolist()) if number != spoilt]
    assert run.ledger.state().round == ROUNDS
    counts = dropped_records(LogStore(run.config.log_location).commits())
    assert counts == {0: {spoilt: int((all_rows.round == spoilt).sum())}}
    assert run.metrics[-1]["not_finite_records"] in (0.0, float(counts[0][spoilt]))  # the thread may be behind


def test_inspection_works_and_counts_them(log: Path, tmp_path: Path) -> None:
    """Fault 5: stats, show and report ended in an IndexError, export in a ValueError; verify said nothing."""
    from rich.console import Console

    mistakes = MistakeLog(log)
    stats, texts = collect(mistakes), TokenTexts(None, "no texts")
    assert stats.not_finite == spoilt_rows() and stats.rows == len(EXAMPLES) - spoilt_rows()
    console = Console(record=True, width=200)
    console.print(stats_view(stats, texts, 5))
    assert f"{spoilt_rows()} rows hold numbers that are not finite" in console.export_text()
    document = json.loads(json.dumps(stats.to_dict(texts, 5), allow_nan=False))
    assert document["not_finite"] == spoilt_rows()
    assert f"{spoilt_rows()} rows hold numbers that are not finite" in report_page(MistakeLog(log), texts)
    for sample in range(6):
        assert all(np.isfinite(visit.loss).all() for visit in visits_of(mistakes, sample))
    found = verify_log(log)
    assert found.not_finite == spoilt_rows() and not found.bad and not found.good
    assert any("rows hold numbers that are not finite" in line for line in found.lines())
    exported = MistakeLog(log)
    assert export_jsonl(exported, tmp_path / "rows.jsonl", texts) == len(EXAMPLES) - spoilt_rows()
    assert sum(exported.not_finite.values()) == spoilt_rows()


def test_a_log_of_nothing_else_is_told(tmp_path: Path) -> None:
    """Fault 5: every row spoilt is no crash either."""

    def spoil_all(records: Records) -> None:
        records.token_loss[:] = np.inf

    examples = [example for example in EXAMPLES if 4 <= example.round <= 6]
    folder = make_log(tmp_path / "log", [*EXAMPLES[:1], *examples], spoil=spoil_all)
    stats = collect(MistakeLog(folder))
    assert stats.not_finite == len(examples) and stats.rows == 1
    with pytest.raises(ValueError, match=r"no target token to report on yet; .* not finite"):
        report_page(MistakeLog(folder), TokenTexts(None, "no texts"), (4, 6))
    missing = next(e.sample for e in examples if e.sample != EXAMPLES[0].sample)
    with pytest.raises(SampleNotFoundError, match="rows with numbers that are not finite are not shown"):
        visits_of(MistakeLog(folder), missing)
